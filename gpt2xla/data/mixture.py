"""Several data sets mixed by weight: which data set the n-th sequence of a run comes from, and its index within that one.

A pattern of 10,000 entries, in which each data set occurs according to its weight, repeats for ever. Both answers follow
from n by a division and a look-up, and any 10,000 sequences in a row hold each data set in its exact share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpt2xla.data.permutation import permute
from gpt2xla.errors import InputError

PATTERN = 10_000


@dataclass(frozen=True)
class Mixture:
    """The pattern in which data sets take turns.

    Attributes:
        counts: how often each data set occurs in the pattern.
        pattern: (PATTERN,), the number of the data set of each entry.
        ranks: (PATTERN,), how many entries of the same data set come before each entry.
    """

    counts: tuple[int, ...]
    pattern: np.ndarray
    ranks: np.ndarray

    @classmethod
    def of(cls, weights: Sequence[float]) -> Mixture:
        """Return the mixture of data sets with these weights, which need not add up to 1. Raises InputError if
        there are more than PATTERN."""
        if len(weights) > PATTERN:
            raise InputError(f"--train-dir names {len(weights)} folders; at most {PATTERN} can be mixed")
        counts = _apportion(weights)
        pattern = np.repeat(np.arange(len(counts)), counts)[permute(np.arange(PATTERN), PATTERN, "mixture")]
        ranks = np.empty(PATTERN, dtype=np.int64)
        for number, count in enumerate(counts):
            ranks[pattern == number] = np.arange(count)
        return cls(counts, pattern, ranks)

    @property
    def shares(self) -> list[float]:
        return [count / PATTERN for count in self.counts]

    def runs(self, first: int, count: int) -> list[tuple[int, np.ndarray, int]]:
        """Return where sequences first .. first + count - 1 come from. For each data set among them: its number, which
        of the `count` sequences are its own, and the index of the first of these within it; the others follow that one."""
        sequences = np.arange(first, first + count)
        entries = sequences % PATTERN
        chosen = self.pattern[entries]
        found = []
        for number in np.unique(chosen).tolist():
            rows = np.flatnonzero(chosen == number)
            start = int(sequences[rows[0]]) // PATTERN * self.counts[number] + int(self.ranks[entries[rows[0]]])
            found.append((number, rows, start))
        return found


def _apportion(weights: Sequence[float]) -> tuple[int, ...]:
    """Divide PATTERN entries among the weights by largest remainder, with at least one for each."""
    quotas = np.array(weights, dtype=np.float64) / math.fsum(weights) * PATTERN
    counts = np.maximum(1, np.floor(quotas).astype(np.int64))
    while counts.sum() < PATTERN:
        counts[np.argmax(quotas - counts)] += 1
    while counts.sum() > PATTERN:  # many tiny weights got one
        counts[np.argmax(np.where(counts > 1, counts - quotas, -np.inf))] -= 1
    return tuple(counts.tolist())
