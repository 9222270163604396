"""A line that a compiler must not look across."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# Called as fence(tensors): replaces them, in place, by equal ones whose origin a compiler does not see, and which are
# there only when all of them are. So it can neither merge two computations of the same thing, nor begin the next before the
# last has ended.
Fence = Callable[[list[Tensor]], None]


def no_fence(tensors: list[Tensor]) -> None:
    """For devices that run operations as they are called."""
