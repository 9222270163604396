"""Describes rows of conversations: how full they are, and their text with the trained tokens told apart.

In a row each conversation begins with an end-of-text token that is not trained, and more of these fill the end
(`preparation/rows.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from gpt2xla.data.shards import TokenStream

_ROWS_AT_ONCE = 1024


class Row(NamedTuple):
    """A row: `ids` and `trained` of shape (row_length,), where conversations begin in it, and where the last one ends."""

    number: int
    ids: np.ndarray
    trained: np.ndarray
    starts: list[int]
    end: int

    def conversations(self) -> Iterator[list[tuple[list[int], bool]]]:
        """Yield the conversations, each as its runs of ids that are all trained, or all not."""
        for start, end in pairwise([*self.starts, self.end]):
            borders = np.flatnonzero(np.diff(self.trained[start:end])) + start + 1
            runs = pairwise([start, *borders.tolist(), end])
            yield [(self.ids[a:b].tolist(), bool(self.trained[a])) for a, b in runs]


@dataclass
class RowCounts:
    """What was counted in the rows of a split.

    Attributes:
        length: tokens in each row.
        conversations: how many rows hold each number of conversations.
        trained: number of tokens whose prediction counts.
        fill: number of tokens after the last conversation of their row.
    """

    length: int
    conversations: Counter[int] = field(default_factory=Counter)
    trained: int = 0
    fill: int = 0

    @property
    def rows(self) -> int:
        return self.conversations.total()

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def samples(self) -> int:
        """Conversations in all rows."""
        return sum(number * rows for number, rows in self.conversations.items())

    @property
    def mean(self) -> float:
        """Conversations per row."""
        return self.samples / self.rows


def count_rows(stream: TokenStream) -> RowCounts:
    """Count all rows of a split in one pass, some rows in memory at a time."""
    length, total = _row_length(stream), stream.length // _row_length(stream)
    found = RowCounts(length)
    for first in range(0, total, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, total - first)
        trained = stream.trained(first * length, count * length).reshape(count, length)
        starts, ends = _layout(stream, first, count, trained)
        values, rows = np.unique(starts.sum(axis=1), return_counts=True)
        found.conversations.update(dict(zip(values.tolist(), rows.tolist(), strict=True)))
        found.trained += int(trained.sum())
        found.fill += int((length - ends).sum())
    return found


def sample_rows(stream: TokenStream, number: int) -> Iterator[Row]:
    """Yield `number` rows, evenly spread from the first to the last, or all if there are fewer."""
    length, total = _row_length(stream), stream.length // _row_length(stream)
    for row in np.unique(np.linspace(0, total - 1, number, dtype=np.int64)).tolist():
        trained = stream.trained(row * length, length)
        starts, ends = _layout(stream, row, 1, trained[None])
        yield Row(row, stream.read(row * length, length), trained, np.flatnonzero(starts[0]).tolist(), int(ends[0]))


def _layout(stream: TokenStream, first: int, count: int, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where conversations begin, booleans of shape (rows, row_length), and the end of each row's last one."""
    length = _row_length(stream)
    ids = stream.read(first * length, count * length).reshape(count, length)
    assert stream.manifest is not None
    opening = (ids == stream.manifest.eot_id) & ~trained
    is_last = np.pad(~opening[:, 1:], ((0, 0), (0, 1)))  # of neighbouring ones; a row's own last one is fill
    return opening & is_last, length - np.argmin(opening[:, ::-1], axis=1)


def _row_length(stream: TokenStream) -> int:
    assert stream.manifest is not None
    assert stream.manifest.row_length
    return stream.manifest.row_length
