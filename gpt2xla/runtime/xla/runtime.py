"""PyTorch/XLA through PJRT: TPUs, and `PJRT_DEVICE=CPU`, which takes the same path on any machine.

Nothing here runs before the caller is inside a launched process; importing this file loads torch_xla.
The loop never reads the device: one graph per step, executed by one sync, metrics through step closures."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch_xla.amp import syncfree
from torch_xla.utils.checkpoint import checkpoint as torch_xla_checkpoint

from gpt2xla.config import ModelConfig, OptimConfig, TrainConfig, XlaConfig
from gpt2xla.data.windows import Batch
from gpt2xla.errors import InputError
from gpt2xla.logs.console import say
from gpt2xla.logs.peak_flops import measured_cpu_flops, named_peak_flops
from gpt2xla.model.attention import chunked_attention
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Kernels, choose_kernels
from gpt2xla.model.loss import LOGITS_AT_ONCE, chunked_cross_entropy
from gpt2xla.model.norm import lean_layer_norm
from gpt2xla.optim.muon import Owners
from gpt2xla.runtime.base import P, T
from gpt2xla.runtime.one_device import adam, set_matmul_precision
from gpt2xla.runtime.precision import choose, of_xla
from gpt2xla.runtime.torch.parallel import accumulated
from gpt2xla.runtime.xla.block import fused_blocks
from gpt2xla.runtime.xla.compiles import XlaCompileWatch
from gpt2xla.runtime.xla.device import XlaDevice
from gpt2xla.runtime.xla.flash import flash_attention_for
from gpt2xla.runtime.xla.memory import XlaMemory
from gpt2xla.runtime.xla.owners import ReplicaOwners
from gpt2xla.runtime.xla.pallas_choice import blocks_are_kernels, why_no_flash_attention
from gpt2xla.runtime.xla.scaler import LossScaler, step_unless


class XlaRuntime(XlaDevice):
    """Implements `base.Runtime` for one process, or one thread, of `torch_xla.launch`."""

    watch: XlaCompileWatch
    averages = True  # whether reducing gradients gives their mean over processes, as xm.reduce_gradients and DDP do
    mesh: xs.Mesh | None = None  # of all devices, where one process traces the program of several

    def __init__(self, options: XlaConfig, config: TrainConfig) -> None:
        if options.ddp and torch_xla.device_count() > 1:
            raise InputError(
                "--ddp needs a process per device, but on TPU v2 and v3 two devices share one; leave --ddp out"
            )
        super().__init__(options.compile_cache)
        self.options = options
        self.train = config
        self.rank, self.world_size, self.devices = self._count()
        self.is_main, self.random_rank = self.rank == 0, self.rank
        # A CPU traces the next step on the cores that would compute this one: to wait for it costs next to nothing.
        self.steps_behind = 0 if xr.device_type() == "CPU" else 2
        attributes = xr.global_runtime_device_attributes() if xr.device_type() in ("CUDA", "GPU") else [{}]
        there = of_xla(self.device_kind, attributes[0].get("compute_capability"))
        self.precision = choose(config.mixed_precision, there)
        self.scaler = LossScaler(self.to_device) if self.precision.name == "fp16" else None
        self.state_options = {"max_exp_avg_sq": torch.empty(0)} if options.use_syncfree_optim else {}
        set_matmul_precision(config.matmul_precision)
        self.description = f"{self.devices} x XLA:{xr.device_type()}{self._layout()}"
        self.memory = XlaMemory(self.device_kind, options)
        self.stack_bytes, self.owners = 2**26, self._owners()
        # DistributedDataParallel regroups gradients after its first step: its second and third ones are other programs.
        self.watch = XlaCompileWatch(prints=self.is_main, warm_up=3 if options.ddp else 1)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metrics")
        self._unread: deque[Future[None]] = deque()

    def _count(self) -> tuple[int, int, int]:
        """Return this process's rank, the number of processes, and that of all their devices."""
        return xr.global_ordinal(), xr.world_size(), xr.world_size()

    def _owners(self) -> Owners:
        """Return how Muon's work is divided."""
        if self.world_size == 1:
            return Owners()
        return ReplicaOwners(self.to_device(torch.tensor([self.rank])), self.world_size)

    def _layout(self) -> str:
        """Return what the summary says behind the devices."""
        return f" (torch_xla {torch_xla.__version__})"

    @property
    def device_kind(self) -> str:
        """What the device calls itself, such as "TPU v3", "TPU v5 lite", or "cpu"."""
        return torch_xla._XLAC._xla_device_kind(str(self.device))

    def seed(self, seed: int, step: int) -> None:
        super().seed(seed, step)
        torch_xla.manual_seed(self._seed_of(seed, step), self.device)

    def setup_model(self, model: GPT2, evaluated_tokens: int | None = None) -> nn.Module:
        if self.scaler and xr.device_type() == "CPU" and self.is_main:
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
        """Move `model` to the device, with the main process's weights."""
        on_host = [parameter.detach() for parameter in model.parameters()]
        model.to(self.device)
        # A parameter that was never written in place is traced differently from one that was: without this second copy the
        # first step would be another graph, and the whole step would be compiled twice.
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), on_host, strict=True):
                parameter.copy_(value)
        if xr.world_size() > 1:
            xm.broadcast_master_param(model)

    def _kernels(self, model: ModelConfig) -> Kernels:
        flash_is_out = why_no_flash_attention(self.device_kind, model)
        if self.precision.name != "bf16":
            flash_is_out = "it needs --mixed-precision bf16"
        if self.train.attention == "flash" and flash_is_out:
            raise InputError(f"--attention flash: {flash_is_out}; leave the flag out")
        flash = {} if flash_is_out else {"flash": flash_attention_for(self.device_kind, self.mesh)}
        fence = xm.optimization_barrier_
        fused = None
        if flash and blocks_are_kernels(self.device_kind, model, self.train, spmd=self.mesh is not None):
            fused = fused_blocks(model, self.device_kind, fence)
        logits = self.train.micro_batch_size * model.seq_length // self.devices * model.vocab_size
        return choose_kernels(
            self.train,
            model,
            attention={"chunked": partial(chunked_attention, fence=fence)},
            projected_attention=flash,
            preferred="chunked" if flash_is_out else "flash",
            loss_chunks=-(-2 * logits // LOGITS_AT_ONCE["xla"]),  # 2 bytes each, as on TPUs
            checkpoint=torch_xla_checkpoint,
            layer_norm=partial(lean_layer_norm, fence=fence),
            fused=fused,
            chunked_loss=partial(chunked_cross_entropy, fence=fence),
            static_shapes=True,
        )

    def _adam(self, config: OptimConfig) -> Callable[..., torch.optim.Optimizer]:
        if self.options.use_syncfree_optim:
            return adam(config, syncfree)
        # capturable keeps the step count on the device. On the host its bias corrections would be scalars that at some step
        # round to exactly 1.0, which XLA would compile again.
        return adam(config, capturable=True, foreach=False)

    def number(self, value: float) -> Tensor:
        return self.to_device(torch.tensor(float(value)))

    def device_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        return self.watch.batches(super().device_batches(batches))

    def _send(self, batch: Batch) -> Batch:
        return Batch(*xm.send_cpu_data_to_device(list(batch), self.device))

    def compile_step(self, step: Callable[P, T], name: str) -> Callable[P, T]:
        executed = super().compile_step(step, name)

        def watched(*args: P.args, **kwargs: P.kwargs) -> T:
            with self.watch.step(name):
                return executed(*args, **kwargs)

        return watched

    def accumulate(self, model: nn.Module, *, sync: bool) -> AbstractContextManager[Any]:
        return accumulated(model, sync=sync)

    def backward(self, loss: Tensor) -> None:
        super().backward(loss * self.world_size if self.averages else loss)

    def _set_rate(self, optimizer: torch.optim.Optimizer, rate: float | Tensor) -> None:
        # A rate of exactly 0 would make the plain optimizers divide 0 by 0 where a second moment is 0, and would be another
        # graph with the sync-free ones. 1e-30 moves no weight by more than that.
        rate = max(float(rate), 1e-30)
        # The plain optimizers multiply by 1 - rate * weight_decay. For a small rate that rounds to the constant 1.0, which
        # would be another graph; on the device it is a number like any other. The sync-free ones take a float.
        super()._set_rate(optimizer, rate if self.options.use_syncfree_optim else self.number(rate))

    def _reduce_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.options.ddp:
            xm.reduce_gradients(optimizer)

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: Tensor) -> None:
        found_inf = self.scaler.follow(grad_norm) if self.scaler else (~torch.isfinite(loss + grad_norm)).float()
        if self.options.use_syncfree_optim:
            optimizer.step(found_inf=found_inf)  # type: ignore[call-overload]
        else:
            step_unless(found_inf, optimizer)

    def sum(self, value: Tensor) -> Tensor:
        return xm.all_reduce(xm.REDUCE_SUM, value) if self.world_size > 1 else value

    def gather_rows(self, values: Tensor) -> Tensor:
        return xm.all_gather(values) if self.world_size > 1 else values

    def _sum_on_host(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        # Always of one length: payloads of another would be another graph.
        sent = xm.rendezvous("sum", values.numpy().tobytes())
        return torch.stack([torch.frombuffer(bytearray(part), dtype=values.dtype) for part in sent]).sum(0)

    def barrier(self, name: str) -> None:
        if self.world_size > 1:
            xm.rendezvous(name)

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

    def _to_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.is_main:
            return {}
        names = [name for name, tensor in tensors.items() if tensor.device.type == "xla"]
        on_host = torch_xla._XLAC._xla_get_cpu_tensors([tensors[name].detach() for name in names])
        return {**tensors, **dict(zip(names, on_host, strict=True))}

    def peak_flops(self) -> float | None:
        if xr.device_type() == "CPU":
            return measured_cpu_flops(self.precision.dtype) * self.world_size  # each process measures all its devices
        peak = named_peak_flops(self.device_kind)
        return None if peak is None else peak * self.devices

    def close(self) -> None:
        self._reader.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()
