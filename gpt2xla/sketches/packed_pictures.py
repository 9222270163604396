"""The first step of a worker: from lines of ndjson to packed pictures of the drawings that are kept, and of their copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpt2xla.data.preparation.chance import drawn, uniform_for
from gpt2xla.sketches import quickdraw
from gpt2xla.sketches.augmentation import altered
from gpt2xla.sketches.strokes import LEAST_EXTENT, MOST_COORDINATE, Drawings, rasterise_all, starts_of

_SPLIT_DRAW = 1 << 20  # beyond the numbers of copies


def record_type(size: int) -> np.dtype:
    """Return the type of a packed picture: by `order` it is sorted; `key` identifies its drawing; `word` is a number; `copy`
    is 0 for the drawing as it is, or the number of an altered copy."""
    fields = [
        ("order", "<u8"),
        ("key", "<u8"),
        ("word", "<u4"),
        ("copy", "u1"),
        ("picture", "u1", (size * size + 7) // 8),
    ]
    return np.dtype(fields)


def unpacked(records: np.ndarray, size: int) -> np.ndarray:
    """Return the pictures of records: (N, size, size), bool."""
    bits = np.unpackbits(records["picture"], axis=1, count=size * size)
    return bits.reshape(-1, size, size).astype(np.bool_)


class Rasterised(NamedTuple):
    """Packed pictures of some lines. Their `word` is a number in `words`.

    Attributes:
        train, test: of the type that `record_type` returns. Those of test/ are never copies.
        read: how many drawings the lines hold.
        left_out: how many of them were left out, by the reason.
        name: of the file.
    """

    words: list[str]
    train: np.ndarray
    test: np.ndarray
    read: int
    left_out: Counter[str]
    name: str


@dataclass(frozen=True)
class Rasteriser:
    """Makes pictures of lines. All that is drawn by chance depends on `seed` and the drawing only.

    Attributes:
        copies: how many altered copies each drawing for train/ gets.
        words: those that are kept; all if empty.
    """

    size: int
    stroke_width: int
    copies: int
    seed: int
    test_fraction: float
    words: Collection[str]
    recognized_only: bool

    def __call__(self, lines: quickdraw.Lines, limits: Mapping[str, int]) -> Rasterised:
        """Return the pictures. Drawings whose key is above their word's limit are left out. Raises InputError that names the
        first line that is not a drawing."""
        records = quickdraw.read(lines, self.seed)
        read, left_out = len(records.word), Counter[str]()

        def keep(records: quickdraw.Records, wanted: np.ndarray, why: str) -> quickdraw.Records:
            if dropped := int((~wanted).sum()):
                left_out[why] += dropped
            return records.only(wanted)

        if self.words:
            listed = np.array([word in self.words for word in records.words], dtype=np.bool_)
            records = keep(records, listed[records.word], "of other words")
        if self.recognized_only:
            records = keep(records, records.recognized, "not recognized")
        if limits:
            most = np.array([limits.get(word, 2**64 - 1) for word in records.words], dtype=np.uint64)
            records = keep(records, records.keys <= most[records.word], "beyond --per-word")
        records = keep(records, records.drawings.drawings > 0, "without a stroke")
        for is_right, why in (
            (_is_finite, f"with coordinates beyond {MOST_COORDINATE:,.0f} or NaN"),
            (_is_wide, "of one dot"),
        ):
            if len(records.word):
                records = keep(records, is_right(records.drawings), why)
        is_test = uniform_for(records.keys, _SPLIT_DRAW) < self.test_fraction
        train, test = (
            self._pictures(records.only(chosen), copies) for chosen, copies in ((~is_test, self.copies), (is_test, 0))
        )
        return Rasterised(records.words, train, test, read, left_out, lines.name)

    def _pictures(self, records: quickdraw.Records, copies: int) -> np.ndarray:
        packed = np.empty((1 + copies, len(records.word)), dtype=record_type(self.size))
        if not len(records.word):
            return packed.ravel()
        for copy in range(1 + copies):
            order = drawn(records.keys, copy)
            drawings = records.drawings
            scale: np.ndarray | float = 1.0
            shift: np.ndarray | float = 0.0
            if copy:
                drawings, scale, shift = altered(drawings, order, self.size)
            pictures = rasterise_all(drawings, self.size, self.stroke_width, scale=scale, shift=shift)
            packed[copy]["order"], packed[copy]["key"], packed[copy]["copy"] = order, records.keys, copy
            packed[copy]["word"] = records.word
            packed[copy]["picture"] = np.packbits(pictures.reshape(len(pictures), -1), axis=1)
        return packed.ravel()


def _is_finite(drawings: Drawings) -> np.ndarray:
    largest = np.maximum.reduceat(np.abs(drawings.points).max(axis=0), starts_of(drawings.point_counts))
    return largest <= MOST_COORDINATE


def _is_wide(drawings: Drawings) -> np.ndarray:
    starts = starts_of(drawings.point_counts)
    extent = np.maximum.reduceat(drawings.points, starts, axis=1) - np.minimum.reduceat(drawings.points, starts, axis=1)
    return extent.max(axis=0) >= LEAST_EXTENT
