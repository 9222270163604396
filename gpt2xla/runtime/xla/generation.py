"""Generating text on one XLA device, in the process that asks for it; importing this file loads torch_xla."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch_xla
import torch_xla.core.xla_model as xm
from torch import Tensor

from gpt2xla.config import XlaConfig
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Kernels
from gpt2xla.runtime.xla.compiles import open_compile_cache


class XlaDevice:
    """Implements `generation.Device`."""

    def __init__(self) -> None:
        open_compile_cache(XlaConfig().compile_cache)
        self.device = torch_xla.device()

    def place(self, model: GPT2) -> None:
        model.kernels = Kernels(static_shapes=True)
        model.to(self.device)

    def to_device(self, tensor: Tensor) -> Tensor:
        # As data: tensor.to() would make the scalars 0 and 1 constants of the graph.
        return xm.send_cpu_data_to_device([tensor], self.device)[0]

    def compile_step(self, step: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        def executed(*args: Any) -> Tensor:
            result = step(*args)
            torch_xla.sync()  # the cache too, which reading the result alone would leave to be computed
            return result

        return executed

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()
