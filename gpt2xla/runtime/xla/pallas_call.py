"""A Pallas kernel as one node of a PyTorch/XLA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch_xla
from torch import Tensor


def pallas_call(make: Callable[..., Any], shape: Any, tensors: list[Tensor], **options: bool) -> list[Tensor]:
    """Return the results of the kernel `make(shape, **options)`, such as `pallas_attention.forward(shape)`."""
    payload, shapes, dtypes = _lowered(make, shape, **options)
    return torch_xla._XLAC._xla_tpu_custom_call(tensors, payload, shapes, dtypes)


@functools.cache
def _lowered(make: Callable[..., Any], shape: Any, **options: bool) -> tuple[str, list[torch.Size], list[torch.dtype]]:
    from gpt2xla.model.pallas_lowering import lower

    kernel = make(shape, **options)
    dtypes = [getattr(torch, array.dtype.name) for array in kernel.results]
    return lower(kernel), [torch.Size(array.shape) for array in kernel.results], dtypes
