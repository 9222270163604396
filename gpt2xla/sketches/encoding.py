"""What a worker makes of a bucket of packed pictures: the tokens or the text of its sketches, in the bucket's order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2xla.data.preparation.rows import Sample
from gpt2xla.sketches.buckets import in_order
from gpt2xla.sketches.chance import uniform
from gpt2xla.sketches.format import SketchFormat
from gpt2xla.sketches.options import LossOn
from gpt2xla.sketches.rasterising import record_type, unpacked


class Chosen(NamedTuple):
    """The N sketches of a bucket.

    Attributes:
        words: the word of each.
        before: whether each also begins with its word.
        pictures: (N, size, size), bool.
        is_copy: (N,), bool: whether each is an altered copy of a drawing.
        left_out: how many drawings are not among them, by the reason.
    """

    words: list[str]
    before: list[bool]
    pictures: np.ndarray
    is_copy: np.ndarray
    left_out: Counter[str]


@dataclass(frozen=True)
class Choice:
    """Chooses the sketches of a bucket.

    Attributes:
        size: of the pictures.
        words: by their numbers in the bucket.
        limits: for each word the largest key of a drawing that is taken, uint64.
        word_before: share of the sketches that begin with their word.
    """

    size: int
    words: Sequence[str]
    limits: np.ndarray
    word_before: float

    def __call__(self, file: Path) -> Chosen:
        records = in_order(file, record_type(self.size))
        is_first = np.ones(len(records), dtype=np.bool_)
        is_first[1:] = records["order"][1:] != records["order"][:-1]
        is_within, is_copy = records["key"] <= self.limits[records["word"]], records["copy"] > 0
        left_out = {"there twice": ~is_first & ~is_copy, "beyond --per-word": is_first & ~is_within & ~is_copy}
        kept = records[is_first & is_within]
        return Chosen(
            [self.words[number] for number in kept["word"].tolist()],
            (uniform(kept["order"], 0) < self.word_before).tolist(),
            unpacked(kept, self.size),
            kept["copy"] > 0,
            Counter({why: int(which.sum()) for why, which in left_out.items() if which.any()}),
        )


class Encoded(NamedTuple):
    """Sketches as tokens: `ids` and `trained`, (T,), of all, the `ends` of each, (N,), and the bytes of its text.

    `drawings`: how many are no copies. `left_out`: how many drawings are not among them, by the reason."""

    ids: np.ndarray
    trained: np.ndarray
    ends: np.ndarray
    sizes: list[int]
    drawings: int
    left_out: Counter[str]

    def samples(self) -> Iterator[Sample]:
        start = 0
        for end, size in zip(self.ends.tolist(), self.sizes, strict=True):
            yield Sample(self.ids[start:end], self.trained[start:end], size)
            start = end


@dataclass(frozen=True)
class TokenEncoder:
    """Makes tokens of a bucket. Sketches that are longer than a row are left out."""

    choose: Choice
    format: SketchFormat
    loss_on: LossOn
    row_length: int

    def __call__(self, file: Path) -> Encoded:
        words, before, pictures, is_copy, left_out = self.choose(file)
        sketches = self.format.batch_ids(words, pictures, before) if words else []
        fits = np.array([len(ids) <= self.row_length for ids in sketches], dtype=np.bool_)
        if too_long := int((~fits & ~is_copy).sum()):
            left_out[f"longer than {self.row_length:,} tokens"] += too_long
        kept = np.flatnonzero(fits).tolist()
        ids = np.concatenate([np.empty(0, dtype=self.format.tokenizer.dtype), *(sketches[number] for number in kept)])
        ends = np.cumsum([len(sketches[number]) for number in kept], dtype=np.int64)
        trained = np.ones(len(ids), dtype=np.bool_)
        trained[ends[:-1]] = trained[:1] = False  # nothing predicts a first token
        if self.loss_on == "word":
            starts, marks = [0, *ends[:-1].tolist()], np.flatnonzero(ids == self.format.img_end).tolist()
            for start, mark in zip(starts[: len(kept)], marks, strict=True):
                trained[start : mark + 1] = False
        blank = np.zeros((self.format.size, self.format.size), dtype=np.bool_)

        @cache
        def size_of(word: str, word_before: bool) -> int:
            return len(self.format.text(word, blank, word_before).encode())

        sizes = [size_of(words[number], before[number]) for number in kept]
        return Encoded(ids, trained, ends, sizes, int((fits & ~is_copy).sum()), left_out)


class TextPiece(NamedTuple):
    """Sketches as text. `drawings` and `left_out` as in `Encoded`."""

    text: str
    drawings: int
    left_out: Counter[str]


@dataclass(frozen=True)
class TextEncoder:
    """Makes text of a bucket, with a blank line after each sketch."""

    choose: Choice
    format: SketchFormat

    def __call__(self, file: Path) -> TextPiece:
        words, before, pictures, is_copy, left_out = self.choose(file)
        texts = map(self.format.text, words, pictures, before)
        return TextPiece("".join(f"{text}\n\n" for text in texts), int((~is_copy).sum()), left_out)
