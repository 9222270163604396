"""The XLA runtime on tensors that hold no data, as one of several replicas of any kind of TPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.runtime as xr
from torch import Tensor, nn

from gpt2xla.config import TrainConfig, XlaConfig
from gpt2xla.data.windows import Batch
from gpt2xla.runtime.xla import XlaRuntime


class TracingRuntime(XlaRuntime):
    """Graphs are the ones of `XlaRuntime`; nothing is allocated and nothing can be read."""

    def __init__(self, options: XlaConfig, config: TrainConfig, device_kind: str, replicas: int) -> None:
        self._kind = device_kind
        if replicas > 1:
            devices = [f"xla:{number}" for number in range(replicas)]
            torch_xla._XLAC._xla_set_replication_devices(torch_xla._XLAC._xla_real_devices(devices))
            xr._WORLD_SIZE = replicas
        super().__init__(options, config)
        self.world_size = self.devices = replicas

    @property
    def device_kind(self) -> str:
        return self._kind

    def batches(self, sequences: int, length: int) -> Iterator[Batch]:
        while True:
            yield Batch(*(xb.create_placeholder_tensor(torch.Size((sequences, length)), torch.int64) for _ in range(2)))

    def place_parameters(self, model: nn.Module) -> None:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                placed = nn.Parameter(xb.create_placeholder_tensor(parameter.shape, parameter.dtype))
                with torch.no_grad():
                    placed.copy_(xb.create_placeholder_tensor(parameter.shape, parameter.dtype))
                setattr(module, name, placed)

    def to_device(self, tensor: Tensor) -> Tensor:
        return xb.create_placeholder_tensor(tensor.shape, tensor.dtype)

    def when_ready(self, callback: Callable[..., None], values: Tensor) -> None:
        self.values = values  # kept alive, as a result of the graph
