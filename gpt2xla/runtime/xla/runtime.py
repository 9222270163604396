"""PyTorch/XLA through PJRT: TPUs, and `PJRT_DEVICE=CPU`, which takes the same path on any machine.

Nothing here runs before the caller is inside a launched process; importing this file loads torch_xla.
The loop never reads the device: one graph per step, executed by one sync, metrics through step closures.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch_xla.amp import syncfree
from torch_xla.utils.checkpoint import checkpoint as torch_xla_checkpoint

from gpt2xla.config import ModelConfig, OptimConfig, TrainConfig, XlaConfig
from gpt2xla.data.windows import Batch
from gpt2xla.errors import InputError, is_out_of_memory
from gpt2xla.logs.console import say
from gpt2xla.logs.peak_flops import measured_cpu_flops, named_peak_flops
from gpt2xla.model.attention import chunked_attention
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Attention, Kernels, choose_kernels
from gpt2xla.model.loss import LOGITS_AT_ONCE, chunked_cross_entropy
from gpt2xla.model.norm import lean_layer_norm
from gpt2xla.optim.optimizer import adam_arguments, build_optimizer, clip_gradients
from gpt2xla.optim.state import init_state
from gpt2xla.runtime.base import (
    GIB,
    P,
    Shortage,
    T,
    prefetch,
    random_seed,
    set_matmul_precision,
)
from gpt2xla.runtime.precision import DevicePrecision, choose, of_xla
from gpt2xla.runtime.xla.compiler_messages import compiler_figures
from gpt2xla.runtime.xla.compiles import CompileWatch, count_compiles, open_compile_cache
from gpt2xla.runtime.xla.flash import flash_attention_for, why_no_flash_attention
from gpt2xla.runtime.xla.scaler import LossScaler, step_unless

# What XLA says of memory in its several runtimes; a TPU's compiler gives figures, too.
_MEMORY_IS_FULL = ("RESOURCE_EXHAUSTED", "Out of memory allocating", "Out of memory while trying to allocate")


class XlaRuntime:
    """Implements `runtime.base.Runtime` for one process, or one thread, of `torch_xla.launch`."""

    def __init__(self, options: XlaConfig, config: TrainConfig) -> None:
        if options.ddp and torch_xla.device_count() > 1:
            raise InputError(
                "--ddp needs a process per device, but on TPU v2 and v3 two devices share one; leave --ddp out"
            )
        open_compile_cache(options.compile_cache)
        self.device = torch_xla.device()
        self.rank = xr.global_ordinal()
        self.world_size = xr.world_size()
        self.devices = self.world_size
        self.is_main = self.rank == 0
        self.options, self.train = options, config
        self.precision = choose(config.mixed_precision, self._device_precision())
        self.dtype = self.precision.dtype
        self.scaler = LossScaler(self.to_device) if self.dtype == torch.float16 else None
        set_matmul_precision(config.matmul_precision)
        self.name = f"XLA:{xr.device_type()}"
        self.description = f"{self.devices} x {self.name} (torch_xla {torch_xla.__version__})"
        # DistributedDataParallel regroups gradients after its first step: its second and third ones are other programs.
        self._watch = CompileWatch(prints=self.is_main, warm_up=3 if options.ddp else 1)
        self._step_began = time.perf_counter()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metrics")
        self._unread: deque[Future[None]] = deque()

    def seed(self, seed: int, step: int) -> None:
        torch.manual_seed(random_seed(seed, step, self.rank))
        torch_xla.manual_seed(random_seed(seed, step, self.rank), self.device)

    def setup_model(self, model: GPT2) -> nn.Module:
        if self.dtype == torch.float16 and xr.device_type() == "CPU" and self.is_main:
            say(
                "warning: XLA emulates fp16 on a CPU, a hundred times slower than fp32; choose fp32 or bf16", error=True
            )
        model.kernels = self._kernels(model.config)
        self.place_parameters(model)
        if not self.options.ddp:
            return model
        import torch_xla.distributed.xla_backend  # noqa: F401  registers the backend

        if not dist.is_initialized():
            dist.init_process_group("xla", init_method="xla://")
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    def place_parameters(self, model: nn.Module) -> None:
        on_host = [parameter.detach() for parameter in model.parameters()]
        model.to(self.device)
        # A parameter that was never written in place is traced otherwise than one that was: without this second copy the
        # first step would be a graph of its own, and the whole step be compiled twice.
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), on_host, strict=True):
                parameter.copy_(value)
        if xr.world_size() > 1:
            xm.broadcast_master_param(model)

    def _device_precision(self) -> DevicePrecision:
        attributes = xr.global_runtime_device_attributes() if xr.device_type() in ("CUDA", "GPU") else [{}]
        return of_xla(self.device_kind, attributes[0].get("compute_capability"))

    def _kernels(self, model: ModelConfig) -> Kernels:
        flash_is_out = why_no_flash_attention(
            self.device_kind, model.num_heads, model.d_model // model.num_heads, model.seq_length
        )
        if self.dtype != torch.bfloat16:
            flash_is_out = "it needs --mixed-precision bf16"
        if self.train.attention == "flash" and flash_is_out:
            raise InputError(f"--attention flash: {flash_is_out}; leave the flag out")
        attention: dict[str, Attention] = {"chunked": partial(chunked_attention, fence=xm.optimization_barrier_)}
        if not flash_is_out:
            attention["flash"] = self.flash_attention
        tokens = self.train.train_batch_size * model.seq_length // self.devices
        return choose_kernels(
            self.train,
            model,
            attention=attention,
            preferred="chunked" if flash_is_out else "flash",
            loss_chunks=-(-2 * tokens * model.vocab_size // LOGITS_AT_ONCE["xla"]),
            checkpoint=torch_xla_checkpoint,
            layer_norm=partial(lean_layer_norm, fence=xm.optimization_barrier_),
            chunked_loss=partial(chunked_cross_entropy, fence=xm.optimization_barrier_),
            static_shapes=True,
        )

    @property
    def flash_attention(self) -> Attention:
        return flash_attention_for(self.device_kind)

    @property
    def device_kind(self) -> str:
        """Such as "TPU v3", "TPU v5 lite", or "cpu"."""
        return torch_xla._XLAC._xla_device_kind(str(self.device))

    def build_optimizer(
        self, model: nn.Module, config: OptimConfig, saved: dict[str, Any] | None
    ) -> torch.optim.Optimizer:
        plain_adam, arguments = config.optim_type == "adam", adam_arguments(config)
        extra: dict[str, Any] = {}
        if self.options.use_syncfree_optim:
            adam = partial(syncfree.Adam if plain_adam else syncfree.AdamW, **arguments)
            extra["max_exp_avg_sq"] = torch.empty(0)
        else:
            # capturable keeps the step count on the device. On the host its bias corrections would be scalars that one day
            # round to exactly 1.0, which XLA compiles anew.
            adam_class = torch.optim.Adam if plain_adam else torch.optim.AdamW
            adam = partial(adam_class, capturable=True, foreach=False, **arguments)
        optimizer = build_optimizer(model, config, self.dtype, adam)
        init_state(model, config, optimizer, saved, self.to_device, **extra)
        return optimizer

    def device_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        on_device = prefetch(batches, lambda batch: Batch(*xm.send_cpu_data_to_device(list(batch), self.device)))
        return self._watch.batches(on_device)

    def compile_step(self, step: Callable[P, T], name: str) -> Callable[P, T]:
        def executed(*args: P.args, **kwargs: P.kwargs) -> T:
            with self._watch.step(name):
                self._step_began = time.perf_counter()
                result = step(*args, **kwargs)
                torch_xla.sync()
            return result

        return executed

    def part(self, name: str) -> AbstractContextManager[None]:
        return self._watch.part(name)

    def trace_ms(self) -> float | None:
        return (time.perf_counter() - self._step_began) * 1e3

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("xla", dtype=self.dtype) if self.dtype != torch.float32 else nullcontext()

    def accumulate(self, model: nn.Module, *, sync: bool) -> AbstractContextManager[Any]:
        return model.no_sync() if isinstance(model, DistributedDataParallel) and not sync else nullcontext()

    def backward(self, loss: Tensor) -> None:
        # reduce_gradients and DDP average over processes where a sum is wanted.
        self.scaled(loss * self.world_size).backward()

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scaler.scale if self.scaler else loss

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        # A rate of exactly 0 would make the plain optimizers divide 0 by 0 where a second moment is 0, and is another graph
        # with the sync-free ones. 1e-30 moves no weight by more than that.
        rate = max(rate, 1e-30)
        # The plain optimizers multiply by 1 - rate * weight_decay, which for a small rate rounds to the constant 1.0 and
        # would be another graph; on the device it is a number like any other. The sync-free ones take a float.
        lr = rate if self.options.use_syncfree_optim else self.to_device(torch.tensor(rate))
        for group in optimizer.param_groups:
            group["lr"] = lr

    def optimizer_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, *, max_grad_norm: float
    ) -> tuple[Tensor, Tensor]:
        self.reduce_gradients(optimizer)
        loss = self.sum(loss)
        if self.scaler:
            self.scaler.unscale(model)
        grad_norm = clip_gradients(model, max_grad_norm)
        found_inf = (
            self.scaler.follow(grad_norm) if self.scaler else (~torch.isfinite(loss + grad_norm)).to(torch.float32)
        )
        if self.options.use_syncfree_optim:
            optimizer.step(found_inf=found_inf)  # type: ignore[call-overload]
        else:
            step_unless(found_inf, optimizer)
        optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm

    def reduce_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.options.ddp:
            xm.reduce_gradients(optimizer)

    def sum(self, value: Tensor) -> Tensor:
        return xm.all_reduce(xm.REDUCE_SUM, value) if self.world_size > 1 else value

    def flag(self, value: bool) -> Tensor:
        return self.to_device(torch.tensor(float(value)))

    def gather_rows(self, values: Tensor) -> Tensor:
        return xm.all_gather(values) if self.world_size > 1 else values

    def gather(self, value: float) -> list[float]:
        if self.world_size == 1:
            return [value]
        # Always 8 bytes: payloads of another length would be another graph.
        return [struct.unpack("<d", payload)[0] for payload in xm.rendezvous("gather", struct.pack("<d", value))]

    def when_ready(self, callback: Callable[..., None], values: Tensor) -> None:
        while self._unread and self._unread[0].done():
            self._unread.popleft().result()

        def read() -> None:
            callback(*values.tolist())

        xm.add_step_closure(lambda: self._unread.append(self._reader.submit(read)))

    def wait(self, behind: int = 0) -> None:
        if not behind:
            torch_xla.sync()
        while len(self._unread) > behind:
            self._unread.popleft().result()

    def to_device(self, tensor: Tensor) -> Tensor:
        # tensor.to() would make the scalars 0 and 1 constants of the graph, and the step another graph once they change.
        return xm.send_cpu_data_to_device([tensor], self.device)[0]

    def to_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.is_main:
            return {}
        names = [name for name, tensor in tensors.items() if tensor.device.type == "xla"]
        on_host = torch_xla._XLAC._xla_get_cpu_tensors([tensors[name].detach() for name in names])
        return {**tensors, **dict(zip(names, on_host, strict=True))}

    def save_shards(self, state: dict[str, dict[str, Tensor]], folder: Path) -> dict[str, dict[str, Tensor]]:
        return {key: self.to_host(part) for key, part in state.items()}

    def barrier(self, name: str) -> None:
        if self.world_size > 1:
            xm.rendezvous(name)

    def state_dict(self) -> dict[str, Any]:
        return {"scaler": self.scaler.state_dict()} if self.scaler else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])

    def ended_ranks(self) -> list[int]:
        return []  # their launcher tells

    def compiles(self) -> int:
        return count_compiles()

    def peak_flops(self) -> float | None:
        if xr.device_type() == "CPU":
            return measured_cpu_flops(self.dtype)
        peak = named_peak_flops(self.device_kind)
        return None if peak is None else peak * self.devices

    def shortage(self, error: Exception) -> Shortage | None:
        message = str(error)
        if figures := compiler_figures(message):
            needed, memory = figures
            return Shortage(
                f"{self.device_kind} ({memory / GIB:.2f} GiB, of which the program needs {needed / GIB:.2f})",
                memory,
                needed,
            )
        if any(words in message for words in _MEMORY_IS_FULL) or is_out_of_memory(error):
            return Shortage(self.device_kind)
        return None

    def has_memory_for(self, work: Callable[[], None]) -> bool | None:
        return None

    def free_memory(self) -> int | None:
        return None  # what a compiled step takes is not known beforehand

    def close(self) -> None:
        self._reader.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()
