"""Which tokens each step reads: a pure function of the step, the same for any number of processes.

A split of n tokens has (n - 1) // T windows, where T is seq_length: window w predicts tokens w * T + 1 .. w * T + T from the
tokens before them. The rest at the end is a shorter window, which is read only to validate on the whole split. Training
numbers all its sequences 0, 1, 2, ...: micro-step m of update s reads `batch_size` of them from number
plan.sequences_before(s) + m * batch_size on, and each process reads a contiguous share of these. Data set (`mixture.py`),
epoch and window follow from that number by division, so resuming at any step costs nothing and needs no saved state but the
sizes of updates (`batch_plan.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt2xla.data.batch_plan import BatchPlan, share_of
from gpt2xla.data.mixture import Mixture
from gpt2xla.data.permutation import permute
from gpt2xla.data.shards import TokenStream
from gpt2xla.errors import InputError
from gpt2xla.model.loss import IGNORED_LABEL


class Batch(NamedTuple):
    """Inputs and labels, int64 of shape (sequences, seq_length): `labels[b, t]` is the token after `input_ids[b, t]`.

    The two may share memory, so neither may be written to.
    """

    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Windows:
    """The windows of one split."""

    stream: TokenStream
    seq_length: int
    vocab_size: int

    def __post_init__(self) -> None:
        if (rows := self.stream.row_length) not in (None, self.seq_length):
            made = f"{self.stream.option} {self.stream.name} was prepared in rows of {rows} tokens"
            fix = f"use --seq-length {rows}, or prepare it again with --seq-length {self.seq_length}"
            raise InputError(f"--seq-length {self.seq_length}: {made}; {fix}")
        if self.count == 0:
            few = f"{self.stream.length} tokens, too few for one window of --seq-length {self.seq_length} + 1"
            fix = "prepare more text or shorten --seq-length"
            raise InputError(f"{self.stream.option} {self.stream.name} holds {few}; {fix}")
        self.stream.check_ids(self.vocab_size)

    @property
    def count(self) -> int:
        return max(0, self.stream.length - 1) // self.seq_length

    @property
    def rest(self) -> int:
        """How many tokens the shorter window after the last whole one predicts."""
        return (self.stream.length - 1) % self.seq_length

    def trained_tokens(self, windows: range | np.ndarray) -> int:
        """Return how many labels of whole windows count."""
        if not self.stream.is_masked:
            return len(windows) * self.seq_length
        if isinstance(windows, range):
            return int(np.count_nonzero(self._trained(windows.start, len(windows))))
        return sum(int(np.count_nonzero(self._trained(window))) for window in windows.tolist())

    def _trained(self, window: int, count: int = 1) -> np.ndarray:
        """Return for the labels of neighbouring windows whether they count."""
        return self.stream.trained(window * self.seq_length + 1, count * self.seq_length)

    def batch(self, windows: range | np.ndarray) -> Batch:
        """Return the given windows, in that order. In an array, `count` means the shorter window after the last whole one,
        and -1 a row without labels."""
        if isinstance(windows, range):
            return self._run(windows)
        length, stream = self.seq_length, self.stream
        rows = np.zeros((len(windows), length + 1), dtype=stream.dtype)
        for row, window in zip(rows, windows.tolist(), strict=True):
            if window >= 0:
                count = (length if window < self.count else self.rest) + 1
                row[:count] = stream.read(window * length, count)
                self._check(row[:count], window * length)
        labels = rows[:, 1:].astype(np.int64)
        labels[windows < 0] = IGNORED_LABEL
        labels[windows == self.count, self.rest :] = IGNORED_LABEL
        if stream.is_masked:  # which has whole windows only
            for row, window in zip(labels, windows.tolist(), strict=True):
                if window >= 0:
                    row[~self._trained(window)] = IGNORED_LABEL
        return Batch(torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(labels))

    def _run(self, windows: range) -> Batch:
        """Return neighbouring windows. They are one run of tokens, converted once: labels are the inputs one place later."""
        count, start = len(windows) * self.seq_length, windows.start * self.seq_length
        tokens = self.stream.read(start, count + 1)
        self._check(tokens, start)
        run = torch.from_numpy(tokens.astype(np.int64))
        inputs, labels = run[:-1], run[1:]
        if self.stream.is_masked:
            labels = labels.where(torch.from_numpy(self._trained(windows.start, len(windows))), IGNORED_LABEL)
        return Batch(inputs.view(-1, self.seq_length), labels.view(-1, self.seq_length))

    def _check(self, tokens: np.ndarray, start: int) -> None:
        if tokens.max() >= self.vocab_size or (tokens.dtype.kind == "i" and tokens.min() < 0):
            place = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
            wrong = f"id {tokens[place]} does not fit --vocab-size {self.vocab_size}"
            fix = "use a larger one or prepare the data again"
            raise InputError(f"{self.stream.file_of(start + place)}: {wrong}; {fix}")


@dataclass(frozen=True)
class EpochOrder:
    """The order in which the windows of one data set are read, epoch after epoch.

    Args:
        count: number of windows in the data set.
        per_epoch: number of windows that each epoch reads.
        shuffle_key: the key of a permutation per epoch, without replacement; None keeps the order.
    """

    count: int
    per_epoch: int
    shuffle_key: str | None

    def windows(self, first: int, count: int) -> range | np.ndarray:
        """Return the windows of reads first .. first + count - 1 of a run; a range if they are neighbours."""
        epoch, position = divmod(first, self.per_epoch)
        if position + count <= self.per_epoch:
            return self._within(epoch, position, count)
        parts = []
        while count:
            part = min(count, self.per_epoch - position)
            parts.append(np.asarray(self._within(epoch, position, part)))
            epoch, position, count = epoch + 1, 0, count - part
        return np.concatenate(parts)

    def _within(self, epoch: int, position: int, count: int) -> range | np.ndarray:
        if self.shuffle_key is None:
            return range(position, position + count)
        # The permutation covers all windows, so with drop_last each epoch drops different ones.
        return permute(np.arange(position, position + count), self.count, f"{self.shuffle_key}/{epoch}")


@dataclass(frozen=True)
class TrainingOrder:
    """The windows of each training step.

    Args:
        sets: the data sets to train on.
        mixture: which of them each sequence comes from.
        plan: how many sequences each update reads.
        rank, world_size: the number of this process, and how many there are.
        drop_last: end each epoch before its last incomplete micro-batch; only for a single data set.
        shuffle_seed: the seed of a permutation per epoch, without replacement; None keeps the order.
    """

    sets: Sequence[Windows]
    mixture: Mixture
    plan: BatchPlan
    rank: int
    world_size: int
    drop_last: bool
    shuffle_seed: int | None

    def __post_init__(self) -> None:
        share_of("--train-batch-size", self.micro_batch, self.world_size)
        if self.drop_last and len(self.sets) > 1:
            raise InputError("--drop-last has no meaning for several data sets, whose epochs end apart; leave it out")
        if self.epochs[0].per_epoch == 0:
            raise InputError(
                f"--drop-last leaves nothing: {self.sets[0].stream.name} has {self.sets[0].count} windows, fewer than "
                f"--train-batch-size {self.micro_batch}; lower it"
            )

    @property
    def micro_batch(self) -> int:
        """Sequences per micro-step in the newest phase, at whose multiples epochs end with `drop_last`."""
        return self.plan.phases[-1].batch_size

    @cached_property
    def epochs(self) -> list[EpochOrder]:
        """The order within each data set."""
        return [
            EpochOrder(
                windows.count,
                windows.count - (windows.count % self.micro_batch if self.drop_last else 0),
                None if self.shuffle_seed is None else f"{self.shuffle_seed}/{number}",
            )
            for number, windows in enumerate(self.sets)
        ]

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Yield this process's share of each micro-batch from update `first_step` on, without end."""
        for step in itertools.count(first_step):
            for micro_step in range(self.plan.at(step).accum):
                yield self.batch(step, micro_step)

    def batch(self, step: int, micro_step: int = 0) -> Batch:
        """Return this process's share of one micro-batch of update `step`."""
        batch_size = self.plan.at(step).batch_size
        share = batch_size // self.world_size
        first = self.plan.sequences_before(step) + micro_step * batch_size + self.rank * share
        if len(self.sets) == 1:
            return self.sets[0].batch(self.epochs[0].windows(first, share))
        together = np.empty((2, share, self.sets[0].seq_length), dtype=np.int64)
        for number, rows, start in self.mixture.runs(first, share):
            part = self.sets[number].batch(self.epochs[number].windows(start, len(rows)))
            together[0, rows], together[1, rows] = part.input_ids.numpy(), part.labels.numpy()
        return Batch(*torch.from_numpy(together))

    def trained_tokens(self, step: int) -> int:
        """Return how many tokens count in the loss of update `step`, on all processes together: at least 1."""
        runs = self.mixture.runs(self.plan.sequences_before(step), self.plan.at(step).sequences)
        counts = (self.sets[n].trained_tokens(self.epochs[n].windows(start, len(rows))) for n, rows, start in runs)
        return max(1, sum(counts))

    def describe(self, step: int) -> str:
        """Return in words which windows update `step` reads, on all processes together."""
        parts = []
        for number, rows, start in self.mixture.runs(self.plan.sequences_before(step), self.plan.at(step).sequences):
            windows = np.asarray(self.epochs[number].windows(start, len(rows)))
            is_run = len(windows) > 1 and bool((np.diff(windows) == 1).all())
            listed = f"{windows[0]} to {windows[-1]}" if is_run else ", ".join(map(str, windows))
            parts.append(f"windows {listed} of {self.sets[number].stream.name}")
        return " and ".join(parts)


def validation_batches(
    windows: Windows, batch_size: int, steps: int | Literal["all"], rank: int, world_size: int, devices: int
) -> Iterator[Batch]:
    """Yield this process's share of the first `steps` batches, or of the whole split with the shorter window at its end.

    All batches have one shape. Rows without labels fill them up, so that each window counts once, whatever the number of
    processes and devices.
    """
    share = padded_share(batch_size, world_size, devices)
    total = validation_windows(windows, batch_size, steps)
    for first in range(0, total, batch_size):
        end, own = min(first + batch_size, total), first + rank * share
        if own + share <= min(end, windows.count):
            yield windows.batch(range(own, own + share))
        else:
            ids = np.arange(own, own + share)
            yield windows.batch(np.where(ids < end, ids, -1))


def validation_windows(windows: Windows, batch_size: int, steps: int | Literal["all"]) -> int:
    """Return how many windows `validation_batches` reads, on all processes together."""
    return windows.count + (windows.rest > 0) if steps == "all" else min(windows.count, steps * batch_size)


def padded_share(batch_size: int, world_size: int, devices: int) -> int:
    """Return the rows per process of a batch that rows without labels fill up until all devices get equally many."""
    return -(-batch_size // devices) * (devices // world_size)
