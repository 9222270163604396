"""How the devices of PyTorch/XLA share the work on Muon's matrices. All trace one program, in which each has as many."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch_xla.core.xla_model as xm
from torch import Tensor

from gpt2xla.optim.muon import Owners, Stack


class ReplicaOwners(Owners):
    """Each replica orthogonalizes a part of the stack and sends it to all. `rank` is this one's number, on the device: as a
    constant it would make another program of each replica."""

    def __init__(self, rank: Tensor, count: int) -> None:
        self.rank, self.count = rank, count

    def collect(self, matrices: Sequence[Tensor], stack: Stack) -> Tensor:
        return filled(matrices, self.count).unflatten(0, (self.count, -1)).index_select(0, self.rank)[0]

    def distribute(self, updates: Tensor, stack: Stack) -> Sequence[Tensor]:
        # Without a pinned layout: with it, torch_xla sends zeros for the others' parts, and sums.
        return xm.all_gather(updates, pin_layout=False).unbind(0)[: len(stack.parameters)]


class SpmdOwners(Owners):
    """The stack is split over the devices; XLA's partitioner adds the communication.

    `place` gives a tensor the layout of parameters of its shape, `split` splits its first dimension over the devices. Both
    sides of a move are stated: left to itself, the partitioner sends matrices one by one, and sums zeros."""

    def __init__(self, count: int, place: Callable[[Tensor], Tensor], split: Callable[[Tensor], Tensor]) -> None:
        self.count, self.place, self.split = count, place, split

    def collect(self, matrices: Sequence[Tensor], stack: Stack) -> Tensor:
        return self.split(self.place(filled(matrices, self.count)) * 1)  # a tensor has one layout

    def distribute(self, updates: Tensor, stack: Stack) -> Sequence[Tensor]:
        whole = self.place(self.split(updates) * 1)
        return [self.place(update) for update in whole.unbind(0)[: len(stack.parameters)]]


def filled(matrices: Sequence[Tensor], count: int) -> Tensor:
    """Return the matrices as one tensor, filled up with copies of the last one to a multiple of `count`."""
    return torch.stack([*matrices, *[matrices[-1]] * (-len(matrices) % count)])
