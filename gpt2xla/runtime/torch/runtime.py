"""Plain PyTorch: one process, or several under torchrun; CUDA, MPS or CPU."""

from __future__ import annotations

import os
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from gpt2xla.config import ModelConfig, OptimConfig, TorchConfig, TrainConfig
from gpt2xla.data.windows import Batch
from gpt2xla.errors import InputError, is_out_of_memory
from gpt2xla.logs.peak_flops import measured_cpu_flops, named_peak_flops
from gpt2xla.model.attention import chunked_attention, kept_attention, kept_numbers
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Kernels, choose_kernels
from gpt2xla.model.loss import LOGITS_AT_ONCE, in_place_cross_entropy
from gpt2xla.optim.optimizer import adam_arguments, build_optimizer, clip_gradients
from gpt2xla.optim.state import init_state
from gpt2xla.runtime import precision
from gpt2xla.runtime.base import (
    GIB,
    P,
    Shortage,
    T,
    prefetch,
    random_seed,
    set_matmul_precision,
)
from gpt2xla.runtime.torch import parallel
from gpt2xla.runtime.torch.compile import CompiledBlock, open_compile_cache, pays, why_not_compiled
from gpt2xla.runtime.torch.cpu_products import choose_products
from gpt2xla.runtime.torch.cpu_threads import count_threads, share_cores
from gpt2xla.runtime.torch.host_memory import free_host_memory, keep_freed_memory
from gpt2xla.runtime.torch.peers import Peers
from gpt2xla.runtime.torch.process_group import Place, find_place, join

# Where a library asks for memory past torch's own allocator, or the allocator is MPS's.
_DEVICE_IS_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory")

_KEPT_BYTES = 2**31  # that attention may keep for the backward pass, on a CPU


class TorchRuntime:
    """Implements `runtime.base.Runtime`. Joins torchrun's process group if there is one."""

    def __init__(self, options: TorchConfig, config: TrainConfig) -> None:
        place = find_place(os.environ)
        self.rank, self.world_size = (place.rank, place.world_size) if place else (0, 1)
        self.devices = self.world_size
        self.is_main = self.rank == 0
        self.distributed = place is not None
        parallel.check_options(options, distributed=self.distributed)
        self.options = options
        self.device = _pick_device(place)
        if place:
            join(place, _backend(options.ddp_backend, self.device))
        self.mesh = init_device_mesh(self.device.type, (self.world_size,)) if options.fsdp else None
        self._peers = Peers() if self.distributed else None
        if self.device.type == "cpu":
            share_cores()
            keep_freed_memory()
            choose_products(config.matmul_precision)
        else:
            set_matmul_precision(config.matmul_precision)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
            torch.use_deterministic_algorithms(True)
        self.precision = precision.choose(config.mixed_precision, precision.of_torch(self.device))
        self.dtype = self.precision.dtype
        self.train = config
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        threads = f", {count_threads(self.world_size)}" if self.device.type == "cpu" else ""
        layout = parallel.describe(options)
        self.description = f"{self.world_size} x {self.name}{threads} (torch {torch.__version__}{layout})"
        self._sharded: nn.Module | None = None
        self._compiled: CompiledBlock | None = None
        self._pending: deque[tuple[Callable[..., None], Tensor, torch.cuda.Event | None]] = deque()

    def seed(self, seed: int, step: int) -> None:
        torch.manual_seed(random_seed(seed, step, self.rank))

    def setup_model(self, model: GPT2) -> nn.Module:
        self._compiled = self._compile(model)
        model.kernels = self._kernels(model.config)
        return self._place(model)

    def _compile(self, model: GPT2) -> CompiledBlock | None:
        flops = model.flops_per_token() * model.config.seq_length * self.train.train_batch_size / self.devices
        flops *= self.train.train_steps * self.train.gradient_accum_step
        asked = self.train.compile
        if asked and (lack := why_not_compiled(self.device)):
            raise InputError(f"--compile: {lack}; leave it out")
        if asked is False or not (asked or pays(self.device, flops)):
            return None
        open_compile_cache(self.options.compile_cache)
        return CompiledBlock(prints=self.is_main)

    def _kernels(self, model: ModelConfig) -> Kernels:
        sequences, kind = self.train.train_batch_size // self.devices, self.device.type
        logits = sequences * model.seq_length * model.vocab_size
        keeps = kind == "cpu" and kept_numbers(sequences, model) * self.dtype.itemsize <= _KEPT_BYTES
        in_chunks = (
            kind in LOGITS_AT_ONCE and self.dtype != torch.float16
        )  # whose gradients are not in its range unscaled
        return choose_kernels(
            self.train,
            model,
            attention={"chunked": chunked_attention} | ({"kept": kept_attention} if kind == "cpu" else {}),
            preferred="kept" if keeps else "sdpa",
            chunked_loss=partial(in_place_cross_entropy, reads_wait=kind != "cpu"),
            loss_chunks=-(-logits * self.dtype.itemsize // LOGITS_AT_ONCE[kind]) if in_chunks else None,
            checkpoint=partial(checkpoint, use_reentrant=False),
            compiled=self._compiled,
        )

    def _place(self, model: GPT2) -> nn.Module:
        if self.mesh:
            self._sharded = parallel.shard_fully(model, self.mesh, self.device)
            return self._sharded
        model.to(self.device)
        return parallel.wrap_in_ddp(model, self.device) if self.distributed else model

    def build_optimizer(
        self, model: nn.Module, config: OptimConfig, saved: dict[str, Any] | None
    ) -> torch.optim.Optimizer:
        parallel.check_optimizer(self.options, config)
        adam_class = torch.optim.Adam if config.optim_type == "adam" else torch.optim.AdamW
        fused = self.device.type in ("cuda", "cpu")
        make = partial(parallel.split_optimizer, adam_class) if self.options.zero1 else adam_class
        optimizer = build_optimizer(model, config, self.dtype, partial(make, fused=fused, **adam_arguments(config)))
        place = partial(parallel.split, mesh=self.mesh, device=self.device) if self.mesh else self.to_device
        init_state(model, config, parallel.own_part(optimizer), saved, place, count_on_device=fused)
        return optimizer

    def device_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        pin = self.device.type == "cuda"

        def to_device(batch: Batch) -> Batch:
            return Batch(*((t.pin_memory() if pin else t).to(self.device, non_blocking=pin) for t in batch))

        return prefetch(batches, to_device)

    def compile_step(self, step: Callable[P, T], name: str) -> Callable[P, T]:
        def executed(*args: P.args, **kwargs: P.kwargs) -> T:
            with parallel.gathered(self._sharded) if self._sharded else nullcontext():
                return step(*args, **kwargs)

        return executed

    def part(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def trace_ms(self) -> float | None:
        return None

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.dtype) if self.dtype != torch.float32 else nullcontext()

    def accumulate(self, model: nn.Module, *, sync: bool) -> AbstractContextManager[Any]:
        return parallel.accumulated(model, sync=sync)

    def backward(self, loss: Tensor) -> None:
        # DDP and FSDP average gradients over processes where a sum is wanted.
        self.scaler.scale(loss * self.world_size).backward()

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate

    def optimizer_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, *, max_grad_norm: float
    ) -> tuple[Tensor, Tensor]:
        self.scaler.unscale_(optimizer)
        loss = self.sum(loss)
        grad_norm = clip_gradients(model, max_grad_norm)
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            _step_if(torch.isfinite(loss) & torch.isfinite(grad_norm), optimizer)
        optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm

    def sum(self, value: Tensor) -> Tensor:
        if self.distributed:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def flag(self, value: bool) -> Tensor:
        return torch.full((), float(value), device=self.device)  # a kernel's argument: a copy would wait for the device

    def gather_rows(self, values: Tensor) -> Tensor:
        if not self.distributed:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values)
        return torch.cat(parts)

    def gather(self, value: float) -> list[float]:
        if not self.distributed:
            return [value]
        values = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        values[self.rank] = value
        return self.sum(values).tolist()

    def when_ready(self, callback: Callable[..., None], values: Tensor) -> None:
        # On CUDA the values of this step are read when the next one asks: the device is never left without work.
        event = None
        if self.device.type == "cuda":
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._run_pending()
        self._pending.append((callback, values, event))
        if event is None:
            self._run_pending()

    def wait(self, behind: int = 0) -> None:
        self._run_pending(behind)

    def _run_pending(self, behind: int = 0) -> None:
        while len(self._pending) > behind:
            callback, values, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            callback(*values.tolist())

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def to_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_host = {}
        for name, tensor in tensors.items():
            whole = parallel.joined(tensor.detach())
            if self.is_main:
                on_host[name] = whole.to("cpu", copy=True)
        return on_host

    def save_shards(self, state: dict[str, dict[str, Tensor]], folder: Path) -> dict[str, dict[str, Tensor]]:
        # Whole also where it is split: all checkpoints of this runtime are of one kind, and written in the background.
        if self.options.zero1:
            return {key: parallel.collect(part, self.device) for key, part in state.items()}
        return {key: self.to_host(part) for key, part in state.items()}

    def barrier(self, name: str) -> None:
        if self.distributed:
            dist.barrier()

    def state_dict(self) -> dict[str, Any]:
        return {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler.is_enabled() and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])

    def ended_ranks(self) -> list[int]:
        return self._peers.ended() if self._peers else []

    def compiles(self) -> int:
        return self._compiled.programs if self._compiled else 0

    def peak_flops(self) -> float | None:
        peak = measured_cpu_flops(self.dtype) if self.device.type == "cpu" else named_peak_flops(self.name)
        return None if peak is None else peak * self.devices

    def shortage(self, error: Exception) -> Shortage | None:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _DEVICE_IS_FULL):
            if self.device.type != "cuda":
                return Shortage(self.name)
            memory = torch.cuda.get_device_properties(self.device).total_memory
            return Shortage(f"{self.device} ({self.name}, {memory / GIB:.0f} GiB)", memory)
        return Shortage("this machine") if is_out_of_memory(error) else None

    def has_memory_for(self, work: Callable[[], None]) -> bool | None:
        if self.mesh:
            return None  # the other processes, whose weights it needs, may not have failed
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            with torch.compiler.set_stance("force_eager"):  # which takes more than compiled code, and no minutes
                work()
        except Exception as error:
            if self.shortage(error) is None:
                raise
            traceback.clear_frames(error.__traceback__)
            return False
        return True

    def free_memory(self) -> int | None:
        free = free_host_memory() if self.device.type == "cpu" else None
        return None if free is None else free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def close(self) -> None:
        if self.distributed and dist.is_initialized():
            dist.destroy_process_group()


def _step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()`, where `finite` is true."""
    if any(group.get("fused") for group in optimizer.param_groups):
        # As torch.amp.GradScaler asks for it: fused kernels decide on the device.
        own = parallel.own_part(optimizer)
        own.grad_scale, own.found_inf = None, (~finite).to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()


def _pick_device(place: Place | None) -> torch.device:
    if torch.cuda.is_available():
        processes, devices = place.local_world_size if place else 1, torch.cuda.device_count()
        if processes > devices:
            raise InputError(
                f"--nproc_per_node {processes}: there are only {devices} GPUs here; start that many processes"
            )
        if place and place.world_size > 1 and place.local_rank is None and devices > 1:
            raise InputError("LOCAL_RANK is not set, which names this process's GPU; start the processes with torchrun")
        device = torch.device("cuda", place.local_rank or 0 if place else 0)
        torch.cuda.set_device(device)
        return device
    # No backend of torch.distributed reduces over MPS.
    return torch.device("mps" if torch.backends.mps.is_available() and not place else "cpu")


def _backend(asked: str | None, device: torch.device) -> str:
    backend = asked or ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl" and device.type != "cuda":
        raise InputError("--ddp-backend nccl needs CUDA devices, and there are none here; use gloo")
    return backend
