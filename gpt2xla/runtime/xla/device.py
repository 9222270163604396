"""One XLA device, in the process that uses it: all that generation needs. Importing this file loads torch_xla."""

from __future__ import annotations

from collections.abc import Callable

import torch_xla
import torch_xla.core.xla_model as xm
from torch import Tensor, nn

from gpt2xla.config import XlaConfig
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Kernels
from gpt2xla.runtime.base import P, T
from gpt2xla.runtime.one_device import OneDevice
from gpt2xla.runtime.xla.compiles import open_compile_cache


class XlaDevice(OneDevice):
    """Implements `base.Device`, and what else generation asks for, on XLA."""

    def __init__(self, compile_cache: str = XlaConfig().compile_cache) -> None:
        open_compile_cache(compile_cache)
        super().__init__(torch_xla.device())

    def setup_model(self, model: GPT2, evaluated_tokens: int | None = None) -> nn.Module:
        model.kernels = Kernels(static_shapes=True)
        return super().setup_model(model)

    def to_device(self, tensor: Tensor) -> Tensor:
        # tensor.to() would make the scalars 0 and 1 constants of the graph, and other values would be other graphs.
        return xm.send_cpu_data_to_device([tensor], self.device)[0]

    def compile_step(self, step: Callable[P, T], name: str) -> Callable[P, T]:
        def executed(*args: P.args, **kwargs: P.kwargs) -> T:
            result = step(*args, **kwargs)
            torch_xla.sync()  # the cache too, which reading only the result would leave to be computed
            return result

        return executed
