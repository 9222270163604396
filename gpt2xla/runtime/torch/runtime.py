"""Plain PyTorch: one process, or several under torchrun; CUDA, MPS or CPU."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from gpt2xla.config import OptimConfig, TorchConfig, TrainConfig
from gpt2xla.data.batch_plan import BatchPlan
from gpt2xla.data.windows import Batch
from gpt2xla.errors import InputError, in_one_line
from gpt2xla.logs.console import say
from gpt2xla.model.attention import kept_numbers
from gpt2xla.model.fused.agreement import allowed_error, largest_error
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Fused, Kernels, choose_kernels
from gpt2xla.optim.muon import own_part
from gpt2xla.optim.state import MOMENTS, MUON_MOMENTS
from gpt2xla.runtime.base import P, T
from gpt2xla.runtime.one_device import OneDevice, adam
from gpt2xla.runtime.precision import choose
from gpt2xla.runtime.torch import parallel
from gpt2xla.runtime.torch.accelerators import choose_backend, pick_accelerator
from gpt2xla.runtime.torch.compile import CompiledBlock, open_compile_cache
from gpt2xla.runtime.torch.owners import ProcessOwners, RowOwners
from gpt2xla.runtime.torch.process_group import Peers, find_place, join, leave


class TorchRuntime(OneDevice):
    """Implements `base.Runtime` for one of torch's devices. Joins torchrun's process group if there is one."""

    def __init__(self, options: TorchConfig, config: TrainConfig, device: str = "auto") -> None:
        self.options = options
        place = find_place(os.environ)
        self.distributed = place is not None
        parallel.check_options(options, distributed=self.distributed)
        self.accelerator = accelerator = pick_accelerator(place, device)
        if place:
            backend = choose_backend(options.ddp_backend, accelerator)
            parallel.check_backend(options, backend, accelerator)
            join(place, backend, accelerator.device)
        accelerator.prepare(config.matmul_precision)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
            torch.use_deterministic_algorithms(True)
            # Nothing here reads what nothing has written; filling each new tensor would cost a pass over it.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        precision = choose(config.mixed_precision, accelerator.precision())
        rank, world_size = (place.rank, place.world_size) if place else (0, 1)
        super().__init__(accelerator.device, precision, rank, world_size)
        self.train = config
        self.mesh = init_device_mesh(accelerator.kind, (world_size,)) if options.fsdp else None
        accelerator.can_try = self.mesh is None  # else the other processes, which may not have failed, would take part
        self.memory, self.state_options = accelerator, {"count_on_device": accelerator.fused}
        self.steps_behind, self.stack_bytes = accelerator.reads_behind, accelerator.stack_bytes
        if self.distributed:
            self.owners = (RowOwners if self.mesh else ProcessOwners)(rank, world_size, self.device)
        self._peers = Peers() if self.distributed else None
        if precision.name == "fp16":
            self.scaler = torch.amp.GradScaler(accelerator.kind, enabled=True)
        layout = parallel.describe(options)
        self.description = f"{accelerator.describe(world_size)} (torch {torch.__version__}{layout})"
        self._sharded: nn.Module | None = None
        self._told: set[str] = set()  # why kernels are not fused
        self._pending: deque[tuple[Callable[..., None], Callable[[], list[float]]]] = deque()

    def setup_model(self, model: GPT2, evaluated_tokens: int | None = None) -> nn.Module:
        flops = self._flops_ahead(model, evaluated_tokens)
        model.kernels = self._checked_kernels(model, flops)
        if isinstance(model.kernels.compiled, CompiledBlock):
            self.watch = model.kernels.compiled
        if self.mesh:
            self._sharded = parallel.shard_fully(model, self.mesh, self.accelerator, self.precision.dtype)
            return self._sharded
        model.to(self.device)
        return parallel.wrap_in_ddp(model, self.accelerator, self.precision.dtype) if self.distributed else model

    def _checked_kernels(self, model: GPT2, flops: float) -> Kernels:
        """Return the kernels to use, without the fused ones if they fail here or compute something else than torch does."""
        why_not = self.accelerator.why_not_fused
        if self.accelerator.has_fused:
            try:
                kernels = self._kernels(model, flops)
                error = largest_error(model.config, kernels, self.device, self.autocast)
                if error < allowed_error(self.precision.dtype, self.train.matmul_precision):  # not if it is NaN
                    return kernels
                why_not = f"their gradients are off by {error:.1e}; please report it"
            except Exception as failure:  # each kind of GPU and version of Triton fails in its own way
                if isinstance(failure, InputError) or self.memory.shortage(failure):
                    raise
                why_not = f"{in_one_line(failure)}; please report it"
            self.accelerator.has_fused = False
        if why_not and why_not not in self._told:
            self._told.add(why_not)
            text = f"training without fused kernels, which is slower, with torch {torch.__version__}: {why_not}"
            say(f"note: {text}" if self.is_main else f"note: rank {self.rank}: {text}", error=True)
        return self._kernels(model, flops)

    def _fused(self, model: GPT2, flops: float) -> Fused | None:
        """Return the device's own kernels for whole blocks, if it has them and they compute what was asked for."""
        train, accelerator = self.train, self.accelerator
        if train.compile or model.config.dropout > 0 or train.attention not in ("auto", "sdpa"):
            return None
        tokens = train.micro_batch_size // self.devices * model.config.seq_length
        # What is measured may choose another kernel in the next run, which rounds in another way.
        measures = flops >= accelerator.compile_pays_from and not train.deterministic
        return accelerator.fused_blocks(model.config, tokens, self.precision.dtype, measures=measures)

    def _flops_ahead(self, model: GPT2, evaluated_tokens: int | None) -> float:
        """Return the floating-point operations that this process's device will do: those of a whole training run, or of an
        evaluation, which has no backward pass and so takes a third per token."""
        if evaluated_tokens is not None:
            return model.flops_per_token() / 3 * evaluated_tokens / self.devices
        sequences = BatchPlan.of(self.train, self.devices).sequences_before(self.train.train_steps)
        return model.flops_per_token() * model.config.seq_length * sequences / self.devices

    def _compile(self, flops: float) -> CompiledBlock | None:
        asked = self.train.compile
        if asked is False or (asked is None and flops < self.accelerator.compile_pays_from):
            return None
        if lack := self.accelerator.why_not_compiled():
            if asked:
                raise InputError(f"--compile: {lack}; leave it out")
            return None
        open_compile_cache(self.options.compile_cache)
        return CompiledBlock(prints=self.is_main)

    def _kernels(self, model: GPT2, flops: float) -> Kernels:
        device, dtype, sequences = self.accelerator, self.precision.dtype, self.train.micro_batch_size // self.devices
        config = model.config
        logits = sequences * config.seq_length * config.vocab_size * dtype.itemsize
        chunked_loss, at_once = device.chunked_loss(dtype)
        keeps = kept_numbers(sequences, config) * dtype.itemsize <= device.kept_bytes
        fused = self._fused(model, flops)
        return choose_kernels(
            self.train,
            config,
            attention=device.attention,
            preferred="kept" if keeps else "sdpa",
            chunked_loss=chunked_loss,
            loss_chunks=-(-logits // at_once) if at_once else None,
            log_sums=device.log_sums(),
            checkpoint=partial(checkpoint, use_reentrant=False),
            compiled=None if fused else self._compile(flops),
            fused=fused,
        )

    def _adam(self, config: OptimConfig) -> Callable[..., torch.optim.Optimizer]:
        plain = adam(config, fused=self.accelerator.fused)
        return partial(parallel.split_optimizer, plain) if self.options.zero1 else plain

    def _place_state(self, tensor: Tensor) -> Tensor:
        return parallel.split(tensor, self.mesh, self.device) if self.mesh else self.to_device(tensor)

    def _zeros(self, parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter, requires_grad=False)

    def _send(self, batch: Batch) -> Batch:
        pins = self.accelerator.pins
        return Batch(*((t.pin_memory() if pins else t).to(self.device, non_blocking=pins) for t in batch))

    def compile_step(self, step: Callable[P, T], name: str) -> Callable[P, T]:
        def executed(*args: P.args, **kwargs: P.kwargs) -> T:
            with parallel.gathered(self._sharded) if self._sharded else nullcontext():
                return step(*args, **kwargs)

        return executed

    def accumulate(self, model: nn.Module, *, sync: bool) -> AbstractContextManager[Any]:
        return parallel.accumulated(model, sync=sync)

    def backward(self, loss: Tensor) -> None:
        super().backward(loss * self.world_size)  # DDP and FSDP average gradients over processes, but a sum is wanted

    def _reduce_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        pass  # DDP and FSDP did, in the backward pass

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: Tensor) -> None:
        if self.scaler:
            self.scaler.step(optimizer)
            self.scaler.update()
        elif self.accelerator.fused:
            # Fused kernels decide on the device, as torch.amp.GradScaler makes them.
            own, finite = own_part(optimizer), torch.isfinite(loss) & torch.isfinite(grad_norm)
            own.grad_scale, own.found_inf = None, (~finite).to(torch.float32)  # type: ignore[attr-defined]
            optimizer.step()
        else:
            super()._update(optimizer, loss, grad_norm)

    def sum(self, value: Tensor) -> Tensor:
        if self.distributed:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def gather_rows(self, values: Tensor) -> Tensor:
        if not self.distributed:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values)
        return torch.cat(parts)

    def _sum_on_host(self, values: Tensor) -> Tensor:
        return self.sum(values.to(self.device))

    def barrier(self, name: str) -> None:
        if self.distributed:
            dist.barrier()

    def ended_ranks(self) -> list[int]:
        return self._peers.ended() if self._peers else []

    def when_ready(self, callback: Callable[..., None], values: Tensor) -> None:
        self._pending.append((callback, self.accelerator.read_later(values)))
        self.wait(behind=self.steps_behind)

    def wait(self, behind: int = 0) -> None:
        while len(self._pending) > behind:
            callback, read = self._pending.popleft()
            callback(*read())

    def _to_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_host = {}
        for name, tensor in tensors.items():
            whole = parallel.joined(tensor.detach())
            if self.is_main:
                on_host[name] = self.accelerator.to_host(whole)
        return on_host

    def _moments(self, moments: dict[str, dict[str, Tensor]], folder: Path | None) -> dict[str, dict[str, Tensor]]:
        # Whole even where it is split: all checkpoints of this runtime are of one kind and are written in the background.
        split = MOMENTS if self.options.zero1 else MUON_MOMENTS if self.distributed and not self.mesh else ()
        collected = {key: parallel.collect(moments[key], self.accelerator) for key in split if key in moments}
        return collected | super()._moments({key: moments[key] for key in moments if key not in split}, folder)

    def peak_flops(self) -> float | None:
        peak = self.accelerator.peak_flops(self.precision.dtype)
        return None if peak is None else peak * self.devices

    def close(self) -> None:
        if self._peers and dist.is_initialized():
            self._peers.close()
            leave()
