"""Which tokens each step reads: a pure function of the step, the same for any number of processes.

A split of N tokens is cut into (N - 1) // seq_length windows; window w predicts tokens w * L + 1 .. w * L + L from those
before them. Training numbers all sequences it will ever see 0, 1, 2, ...: micro-step m of update s takes
`batch_size` of them, starting with number (s * accum + m) * batch_size, and each process takes its own run of these.
Epoch and window follow from that number by division, so resuming at any step costs nothing and needs no saved state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt2xla.data.shards import TokenStream
from gpt2xla.errors import InputError
from gpt2xla.loss import IGNORED_LABEL


class Batch(NamedTuple):
    """`labels[b, t]` is the token after `input_ids[b, t]`; both int64 of shape (sequences, seq_length)."""

    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Windows:
    """The windows of one split."""

    stream: TokenStream
    seq_length: int
    vocab_size: int

    def __post_init__(self) -> None:
        if self.count == 0:
            raise InputError(
                f"{self.stream.option} {self.stream.folder} holds {self.stream.length} tokens, too few for one window of "
                f"--seq-length {self.seq_length} + 1; prepare more text or shorten --seq-length"
            )
        self.stream.check_ids(self.vocab_size)

    @property
    def count(self) -> int:
        return max(0, self.stream.length - 1) // self.seq_length

    def batch(self, windows: np.ndarray) -> Batch:
        """The given windows, in that order; a number of -1 stands for a row without labels."""
        length = self.seq_length
        rows = np.zeros((len(windows), length + 1), dtype=np.int64)
        for row, window in zip(rows, windows, strict=True):
            if window >= 0:
                row[:] = self.stream.read(int(window) * length, length + 1)
        if rows.min() < 0 or rows.max() >= self.vocab_size:
            row, place = (index[0] for index in np.nonzero((rows < 0) | (rows >= self.vocab_size)))
            raise InputError(
                f"{self.stream.file_of(int(windows[row]) * length + int(place))}: id {rows[row, place]} does not fit "
                f"--vocab-size {self.vocab_size}; use a larger one or prepare the data again"
            )
        labels = rows[:, 1:].copy()
        labels[windows < 0] = IGNORED_LABEL
        return Batch(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(labels))


@dataclass(frozen=True)
class TrainingOrder:
    """The windows of each training step.

    Args:
        windows: the training split.
        batch_size: sequences per micro-step over all processes.
        accum: micro-steps per update.
        rank, world_size: which process this is, and of how many.
        drop_last: end each epoch before its last incomplete micro-batch.
        shuffle_seed: permute the windows of each epoch, without replacement; None keeps their order.
    """

    windows: Windows
    batch_size: int
    accum: int
    rank: int
    world_size: int
    drop_last: bool
    shuffle_seed: int | None

    def __post_init__(self) -> None:
        share_of("--train-batch-size", self.batch_size, self.world_size)
        if self.windows_per_epoch == 0:
            raise InputError(
                f"--drop-last leaves nothing: {self.windows.stream.folder} has {self.windows.count} windows, fewer than "
                f"--train-batch-size {self.batch_size}; lower it"
            )

    @property
    def windows_per_epoch(self) -> int:
        return self.windows.count - (self.windows.count % self.batch_size if self.drop_last else 0)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """This process's micro-batches from update `first_step` on, without end."""
        micro_step = first_step * self.accum
        while True:
            yield self.windows.batch(self.window_ids(micro_step))
            micro_step += 1

    def window_ids(self, micro_step: int) -> np.ndarray:
        """This process's windows in micro-step number `micro_step` since the start of the run."""
        share = self.batch_size // self.world_size
        first = micro_step * self.batch_size + self.rank * share
        sequences = np.arange(first, first + share, dtype=np.int64)
        epochs, positions = np.divmod(sequences, self.windows_per_epoch)
        if self.shuffle_seed is None:
            return positions
        # The permutation runs over all windows, so that with drop_last each epoch drops others.
        return np.array(
            [
                permute(int(p), self.windows.count, f"{self.shuffle_seed}/{e}")
                for e, p in zip(epochs, positions, strict=True)
            ],
            dtype=np.int64,
        )


def validation_batches(windows: Windows, batch_size: int, steps: int, rank: int, world_size: int) -> Iterator[Batch]:
    """This process's share of the first `steps` batches, all of one shape: past the last window come rows without
    labels, so each window counts once however many processes there are."""
    share = share_of("--eval-batch-size", batch_size, world_size)
    for step in range(min(steps, -(-windows.count // batch_size))):
        ids = step * batch_size + rank * share + np.arange(share)
        yield windows.batch(np.where(ids < windows.count, ids, -1))


def share_of(option: str, batch_size: int, world_size: int) -> int:
    """One process's share of a global batch. Raises InputError if it does not divide."""
    if batch_size % world_size:
        raise InputError(
            f"{option} {batch_size} does not divide over {world_size} devices; use a multiple of {world_size}, such as "
            f"{-(-batch_size // world_size) * world_size}"
        )
    return batch_size // world_size


def permute(index: int, size: int, key: str) -> int:
    """Position `index` of a pseudo-random permutation of range(size), in O(1) time and memory.

    A four-round Feistel network over the next power of four, walked until it lands inside the range (Black and Rogaway
    2002, "Ciphers with Arbitrary Finite Domains").
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(4):
            digest = hashlib.blake2b(f"{key}/{round_number}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half | right
        if index < size:
            return index
