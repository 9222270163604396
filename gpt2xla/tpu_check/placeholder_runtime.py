"""The XLA runtime on tensors that hold no data, as one of several replicas of any kind of TPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.runtime as xr
from torch import Tensor, nn

from gpt2xla.config import TrainConfig, XlaConfig
from gpt2xla.data.windows import Batch
from gpt2xla.optim.state import MOMENTS
from gpt2xla.runtime.xla.runtime import XlaRuntime
from gpt2xla.runtime.xla.spmd import SpmdRuntime
from gpt2xla.training.train_step import TrainStep


class TracingRuntime(XlaRuntime):
    """Makes the graphs of `XlaRuntime`, but allocates nothing; nothing can be read."""

    def __init__(self, options: XlaConfig, config: TrainConfig, device_kind: str, replicas: int) -> None:
        self._traced_kind = device_kind
        if replicas > 1 and not options.spmd:
            devices = [f"xla:{number}" for number in range(replicas)]
            torch_xla._XLAC._xla_set_replication_devices(torch_xla._XLAC._xla_real_devices(devices))
            xr._WORLD_SIZE = replicas
        super().__init__(options, config)
        self.devices = replicas
        self.world_size = 1 if options.spmd else replicas

    @property
    def device_kind(self) -> str:
        return self._traced_kind

    def batches(self, sequences: int, length: int) -> Iterator[Batch]:
        shape = torch.Size((sequences // self.world_size, length))
        while True:
            yield Batch(*(xb.create_placeholder_tensor(shape, torch.int64) for _ in range(2)))

    def forget_pending(self) -> None:
        """Drop what was traced so far, which a real device would have executed."""
        torch_xla._XLAC._clear_pending_irs(str(self.device))

    def begin_step(self, step: TrainStep) -> None:
        """Restore what a real device still knows about its tensors from the step before."""

    def compile_pending(self) -> None:
        """Compile what was traced since `forget_pending`. XLA dumps the graph first, if XLA_FLAGS say so."""
        torch_xla.sync()

    def place_parameters(self, model: nn.Module) -> None:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                placed = nn.Parameter(xb.create_placeholder_tensor(parameter.shape, parameter.dtype))
                with torch.no_grad():
                    placed.copy_(xb.create_placeholder_tensor(parameter.shape, parameter.dtype))
                setattr(module, name, placed)

    def to_device(self, tensor: Tensor) -> Tensor:
        return xb.create_placeholder_tensor(tensor.shape, tensor.dtype)


class TracingSpmdRuntime(TracingRuntime, SpmdRuntime):
    """The same for SPMD.

    Real tensors are divided in memory. These are annotated in the graph instead, at the start of each step, and the compiler
    applies the annotation to the arguments."""

    def batches(self, sequences: int, length: int) -> Iterator[Batch]:
        for batch in super().batches(sequences, length):
            yield Batch(*(self._split_rows(tensor * 1) for tensor in batch))

    def place_parameters(self, model: nn.Module) -> None:
        SpmdRuntime.place_parameters(self, model)

    def begin_step(self, step: TrainStep) -> None:
        with torch.no_grad():
            for parameter in step.model.parameters():
                state = step.optimizer.state[parameter]
                for tensor in (parameter, *(state[name] for name in MOMENTS if name in state)):
                    tensor.mul_(1)
                    self._place(tensor)


def open_scope(name: str) -> Any:
    """Let this thread's operations carry `name`, beside those of the scopes around, until the returned object is no more."""
    torch_xla._XLAC._set_ir_debug(True)
    return torch_xla._XLAC.profiler.scope_pusher(name)
