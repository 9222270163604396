"""How torchrun's processes share the work on Muon's matrices: each belongs to one process, in turn over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2xla.optim.muon import Owners, Stack


class ProcessOwners(Owners):
    """The owner alone keeps a parameter's momentum, and sends the update to all. Parameters and gradients are whole."""

    def __init__(self, rank: int, count: int, device: torch.device) -> None:
        self.rank, self.count, self.device = rank, count, device

    def is_own(self, stack: Stack) -> list[bool]:
        return [(stack.first + number) % self.count == self.rank for number in range(len(stack.parameters))]

    def has_state(self, stack: Stack) -> list[bool]:
        return self.is_own(stack)

    def collect(self, matrices: Sequence[Tensor], stack: Stack) -> Tensor:
        shape = stack.parameters[0].shape
        return torch.stack(list(matrices)) if matrices else torch.zeros(0, *shape, device=self.device)

    def distribute(self, updates: Tensor, stack: Stack) -> Sequence[Tensor]:
        each = -(-len(stack.parameters) // self.count)
        sent = torch.zeros(each, *updates.shape[1:], dtype=updates.dtype, device=self.device)
        sent[: len(updates)] = updates
        parts = torch.empty(self.count, *sent.shape, dtype=sent.dtype, device=self.device)
        dist.all_gather_into_tensor(_as_bytes(parts.flatten(0, 1)), _as_bytes(sent))
        # From (owner, number) to the stack's order, whose first owner is seldom the first process.
        return parts.roll(-stack.first, 0).transpose(0, 1).flatten(0, 1)[: len(stack.parameters)].unbind(0)


class RowOwners(ProcessOwners):
    """Parameters, gradients and momentum are split along their rows, as --fsdp does, into chunks of equal size but the last
    ones. A parameter's owner gets all its rows, and returns to each process its own."""

    def has_state(self, stack: Stack) -> list[bool]:
        return [True] * len(stack.parameters)

    def collect(self, matrices: Sequence[Tensor], stack: Stack) -> Tensor:
        rows, columns = stack.parameters[0].shape
        chunk, each = -(-rows // self.count), -(-len(matrices) // self.count)
        sent = torch.zeros(each * self.count, chunk, columns, dtype=matrices[0].dtype, device=self.device)
        sent[: len(matrices), : len(matrices[0])] = torch.stack(list(matrices))
        by_owner = sent.unflatten(0, (each, self.count)).roll(stack.first, 1).transpose(0, 1)
        whole = _exchanged(by_owner).transpose(0, 1).flatten(1, 2)  # from (process, number, its rows, columns)
        return whole[: sum(self.is_own(stack)), :rows]

    def distribute(self, updates: Tensor, stack: Stack) -> Sequence[Tensor]:
        rows, columns = stack.parameters[0].shape
        chunk, each = -(-rows // self.count), -(-len(stack.parameters) // self.count)
        sent = torch.zeros(each, self.count * chunk, columns, dtype=updates.dtype, device=self.device)
        sent[: len(updates), :rows] = updates
        by_process = sent.unflatten(1, (self.count, chunk)).transpose(0, 1)
        parts = _exchanged(by_process).roll(-stack.first, 0).transpose(0, 1).flatten(0, 1)
        here = min(max(rows - self.rank * chunk, 0), chunk)
        return parts[: len(stack.parameters), :here].unbind(0)


def _exchanged(parts: Tensor) -> Tensor:
    """Send part number i to process i; return the parts that all have sent to this one."""
    received = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
    dist.all_to_all_single(_as_bytes(received), _as_bytes(parts.contiguous()))
    return received


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)  # gloo does not know all types
