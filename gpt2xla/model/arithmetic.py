"""How the model computes: the number type of its matrix products, and a fence between computations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# fence(tensors) replaces the tensors, in place, by equal ones whose origin the compiler cannot see. None of them exists
# before all are computed. So the compiler can neither merge two computations of the same value, nor start the next
# computation before the last one has ended.
Fence = Callable[[list[Tensor]], None]


def no_fence(tensors: list[Tensor]) -> None:
    """Do nothing. This is the fence of devices that run each operation when it is called."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type in which products with `tensor` compute: autocast's if it is on, otherwise the tensor's own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ weight.T + bias, with a gradient of the bias that is summed over tokens in fp32, and rounded once.

    So does torch on other devices. XLA by itself sums in the type of the products: in fp16 that may overflow on the way to a
    sum that does not, and in bf16 it is several times further off than one rounding."""
    if bias is None or x.device.type != "xla" or compute_dtype(x).itemsize > 2:
        return F.linear(x, weight, bias)
    y = F.linear(x, weight)
    return y + bias.to(y.dtype).float().expand_as(y).to(y.dtype)  # what is repeated for each token is summed backward
