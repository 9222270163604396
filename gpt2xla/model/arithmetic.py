"""How the model computes: the number type of its products, and a fence between computations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# fence(tensors) replaces the tensors, in place, by equal ones whose origin the compiler cannot see. They exist only once all
# of them are computed. So the compiler can neither merge two computations of the same value, nor start the next computation
# before the last one has ended.
Fence = Callable[[list[Tensor]], None]


def no_fence(tensors: list[Tensor]) -> None:
    """The fence of devices that run operations as they are called."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type that products with `tensor` compute in: autocast's where it is on, else the tensor's own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
