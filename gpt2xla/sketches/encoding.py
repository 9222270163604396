"""The second step of a worker: from a bucket of packed pictures to the tokens or the text of its sketches, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2xla.data.preparation.chance import uniform_for
from gpt2xla.data.preparation.rows import Sample
from gpt2xla.sketches.buckets import in_order
from gpt2xla.sketches.format import SketchFormat
from gpt2xla.sketches.options import LossOn
from gpt2xla.sketches.packed_pictures import record_type, unpacked

_PIECE = 4096


class Sketches(NamedTuple):
    """N sketches: their words, pictures (N, size, size) of bool, whether each also begins with its word, and whether it is
    of an altered copy."""

    words: list[str]
    pictures: np.ndarray
    before: list[bool]
    are_copies: list[bool]


@dataclass(frozen=True)
class Chosen:
    """The sketches of a bucket that are taken.

    Attributes:
        drawings: how many are no altered copies.
        left_out: how many drawings are not among them, by the reason.
    """

    choice: Choice
    records: np.ndarray
    drawings: int
    left_out: Counter[str]

    def __iter__(self) -> Iterator[Sketches]:
        """Yield them in pieces."""
        size, words = self.choice.size, self.choice.words
        for start in range(0, len(self.records), _PIECE):
            records = self.records[start : start + _PIECE]
            before = uniform_for(records["order"], 0) < self.choice.word_before
            names, are_copies = [words[number] for number in records["word"].tolist()], records["copy"] > 0
            yield Sketches(names, unpacked(records, size), before.tolist(), are_copies.tolist())


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
        records = self._settled(in_order(file, record_type(self.size)))
        is_within, is_drawing = records["key"] <= self.limits[records["word"]], records["copy"] == 0
        is_first = np.zeros(len(records), dtype=np.bool_)  # of those within
        is_first[np.flatnonzero(is_within)[np.unique(records["order"][is_within], return_index=True)[1]]] = True
        left_out = {"there twice": is_within & ~is_first, "beyond --per-word": ~is_within}
        counts = {why: int((which & is_drawing).sum()) for why, which in left_out.items()}
        return Chosen(self, records[is_first], int((is_first & is_drawing).sum()), +Counter(counts))

    def _settled(self, records: np.ndarray) -> np.ndarray:
        """Return sorted records so that those of one order, such as the raw and the simplified form of a drawing, do not
        stand as their files were read."""
        same = np.flatnonzero(records["order"][1:] == records["order"][:-1])
        tied = np.union1d(same, same + 1)

        def held(place: int) -> tuple[int, str, bytes]:
            record = records[place]
            return int(record["order"]), self.words[int(record["word"])], record["picture"].tobytes()

        places = sorted(tied.tolist(), key=held)
        records[tied] = records[places]
        return records


class Tokens(NamedTuple):
    """The sketches of a bucket as tokens.

    Attributes:
        ids, trained: (T,), of all of them.
        ends: (N,), where each ends.
        sizes: the bytes of the text of each.
        drawings, left_out: as in `Chosen`.
    """

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

    def __call__(self, file: Path) -> Tokens:
        chosen = self.choose(file)
        lengths: list[int] = []
        sizes: list[int] = []
        asked: list[int] = []
        pieces = [np.empty(0, dtype=self.format.tokenizer.dtype)]
        too_long = 0
        for words, pictures, before, are_copies in chosen:
            sketches = self.format.batch_ids(words, pictures, before)
            for word, ids, has_before, is_copy in zip(words, sketches, before, are_copies, strict=True):
                if len(ids) <= self.row_length:
                    pieces.append(ids)
                    lengths.append(len(ids))
                    sizes.append(self._text_size(word, has_before))
                    asked.append(self._asked(ids, word, has_before))
                elif not is_copy:
                    too_long += 1
        left_out = chosen.left_out + Counter({f"longer than {self.row_length:,} tokens": too_long})
        ids, ends = np.concatenate(pieces), np.cumsum(lengths, dtype=np.int64)
        trained = np.ones(len(ids), dtype=np.bool_)
        for start, count in zip((ends - lengths).tolist(), asked, strict=True):
            trained[start : start + count] = False
        return Tokens(ids, trained, ends, sizes, chosen.drawings - too_long, left_out)

    def _asked(self, ids: np.ndarray, word: str, word_before: bool) -> int:
        """Return how many ids at the beginning of a sketch are given, and not trained on."""
        if self.loss_on == "all":
            return 1  # nothing predicts the first token
        if self.loss_on == "answer" and word_before:
            return len(self.format.drawing_prompt(word))
        return int(np.flatnonzero(ids == self.format.img_end)[0]) + 1

    @cached_property
    def _blank(self) -> int:
        picture = np.zeros((self.format.size, self.format.size), dtype=np.bool_)
        return len(self.format.text("", picture, False))

    def _text_size(self, word: str, word_before: bool) -> int:
        """Return the bytes of a sketch's text."""
        size = len(word.encode())
        return self._blank + size + word_before * (1 + size)


class Text(NamedTuple):
    """The sketches of a bucket as text. `drawings` and `left_out` as in `Chosen`."""

    text: str
    drawings: int
    left_out: Counter[str]


@dataclass(frozen=True)
class TextEncoder:
    """Makes text of a bucket, with a blank line after each sketch."""

    choose: Choice
    format: SketchFormat

    def __call__(self, file: Path) -> Text:
        chosen = self.choose(file)
        texts = (text for sketches in chosen for text in map(self.format.text, *sketches[:3]))
        return Text("".join(f"{text}\n\n" for text in texts), chosen.drawings, chosen.left_out)
