"""Packs samples, such as conversations, into rows of one length, and writes these as a split of masked rows.

A sample stands whole in one row and begins with the end-of-text token, so that --document-mask separates it from its
neighbours. What is left of a row is filled with end-of-text. Of all these tokens the mask selects those that are trained on,
never the first of a sample: nothing in its row predicts it. Window w of such a split is row w, and its last label, the first
token of the next row, is not trained on.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2xla.data.preparation.writer import ShardWriter, Written
from gpt2xla.data.shards import Manifest
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import InputError

_OPEN_ROWS = 1000  # among which a sample finds its place; more waste hardly less


@dataclass(frozen=True)
class Sample:
    """What stands whole in one row.

    Attributes:
        ids: (T,), unsigned integers.
        trained: (T,), bool: which of them are trained on. At least one is.
        size: bytes of its text in UTF-8.
    """

    ids: np.ndarray
    trained: np.ndarray
    size: int

    def begun_with(self, eot_id: int) -> Sample:
        """Return the sample with the end-of-text token in front, unless it begins with it. This one must fit into a row."""
        if len(self.ids) and self.ids[0] == eot_id:
            return self
        ids = np.concatenate([np.array([eot_id], dtype=self.ids.dtype), self.ids])
        return Sample(ids, np.concatenate([[False], self.trained]), self.size)


class Row(NamedTuple):
    """A packed row: `ids` and `trained` as in `Sample`, and how many samples and bytes of text it holds."""

    ids: np.ndarray
    trained: np.ndarray
    samples: int
    size: int


def pack(samples: Iterable[Sample], row_length: int, eot_id: int) -> Iterator[Row]:
    """Yield rows that hold each sample once. Every sample must fit (`Sample.begun_with`).

    Samples are placed in the order given, each into the open row with the least room that suffices. Of a bounded number of
    open rows the fullest is closed when one more is needed, so memory does not grow with the number of samples. The rows
    depend on nothing else: the same samples give the same rows."""
    by_room: list[tuple[int, int]] = []  # (room, number) of each open row, sorted
    held: dict[int, list[Sample]] = {}
    opened = 0
    for sample in samples:
        begun = sample.begun_with(eot_id)
        length = len(begun.ids)
        assert length == len(begun.trained)
        assert length <= row_length
        assert begun.trained.any()
        assert not begun.trained[0]
        place = bisect_left(by_room, (length, 0))
        if place < len(by_room):
            room, number = by_room.pop(place)
        else:
            room, number, opened = row_length, opened, opened + 1
        held.setdefault(number, []).append(begun)
        if room == length:
            yield _row(held.pop(number), row_length, eot_id)
        else:
            insort(by_room, (room - length, number))
        if len(by_room) > _OPEN_ROWS:
            _, fullest = by_room.pop(0)
            yield _row(held.pop(fullest), row_length, eot_id)
    for row in held.values():
        yield _row(row, row_length, eot_id)


def _row(samples: list[Sample], row_length: int, eot_id: int) -> Row:
    ids, trained = np.full(row_length, eot_id, dtype=np.uint32), np.zeros(row_length, dtype=np.bool_)
    end = 0
    for sample in samples:
        start, end = end, end + len(sample.ids)
        ids[start:end], trained[start:end] = sample.ids, sample.trained
    return Row(ids, trained, len(samples), sum(sample.size for sample in samples))


def write_rows(
    folder: Path,
    samples: Iterable[Sample],
    tokenizer: Tokenizer,
    *,
    row_length: int,
    shard_size: int,
    chat_template: str = "",
) -> Manifest:
    """Pack samples into `folder`, as shards with masks, manifest and tokenizer. Memory holds the open rows.

    Args:
        shard_size: tokens per shard; rows may cross from one to the next.
        chat_template: the Jinja template that made the samples, for the manifest; "" for none.

    Raises InputError if the tokenizer has no end-of-text token, or there are no samples, and OSError if the disk is full."""
    eot_id = tokenizer.eot_id
    if eot_id is None:
        raise InputError(
            f"--tokenizer {tokenizer.name} has no end-of-text token, which separates the samples of a row; choose one that "
            "has an eos_token"
        )
    writer = ShardWriter(folder, tokenizer.dtype, shard_size, Written([]), masks=True)
    for ids, trained, count, size in pack(samples, row_length, eot_id):
        writer.add(ids.astype(tokenizer.dtype), count, size, trained)
    if not writer.written.documents:
        raise InputError(f"{folder}: there is nothing to write: no sample was left; give more input")
    writer.add(np.array([eot_id], dtype=tokenizer.dtype), 0, 0, np.zeros(1, dtype=np.bool_))
    return writer.finish(tokenizer, row_length=row_length, chat_template=chat_template)
