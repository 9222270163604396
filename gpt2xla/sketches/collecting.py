"""Reads all drawings once, and leaves their packed pictures in buckets on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpt2xla.data.documents.corpus import InputFile, Split
from gpt2xla.data.preparation.record import SPLITS
from gpt2xla.errors import counted
from gpt2xla.processes.workers import in_order
from gpt2xla.sketches.buckets import Buckets
from gpt2xla.sketches.packed_pictures import Rasterised, Rasteriser
from gpt2xla.sketches.quickdraw import Lines
from gpt2xla.sketches.sources import lines_of
from gpt2xla.sketches.tokenizer import check_word

_NO_LIMIT = 2**64 - 1


class Collected:
    """Drawings that were read. What is chosen of them depends on their keys, not on their order.

    Attributes:
        buckets: the packed pictures of each split.
        words: the words of the drawings that are kept, by their numbers in the buckets.
        counts: how many drawings there are of each, by the same numbers: with `per_word`, those that are taken.
        read: drawings in the files, of any word.
        left_out: how many of them were, by the reason.
        seen: all words in the files.
    """

    def __init__(self, folder: Path, per_word: int | None) -> None:
        self.buckets: dict[Split, Buckets] = {split: Buckets(folder / split) for split in SPLITS}
        self.words: list[str] = []
        self.counts: list[int] = []
        self.read, self.left_out, self.seen = 0, Counter[str](), set[str]()
        self._numbers: dict[str, int] = {}
        self._per_word = per_word
        self._smallest: list[np.ndarray] = []  # keys of each word, sorted: those of the drawings that are taken

    @property
    def limits(self) -> np.ndarray:
        """The largest key of a drawing that is taken, for each word by its number: uint64."""
        full = [len(keys) == self._per_word for keys in self._smallest]
        return np.array(
            [int(keys[-1]) if is_full else _NO_LIMIT for keys, is_full in zip(self._smallest, full, strict=True)],
            dtype=np.uint64,
        )

    def limits_by_word(self) -> dict[str, int]:
        """The limits of the words that have any."""
        if self._per_word is None:
            return {}
        limits = zip(self.words, self.limits.tolist(), strict=True)
        return {word: limit for word, limit in limits if limit < _NO_LIMIT}

    def add(self, part: Rasterised) -> None:
        """Add what a worker made, in which words get their numbers here. Raises OSError if the disk is full."""
        self.read += part.read
        self.left_out += part.left_out
        self.seen.update(part.words)
        numbers = np.zeros(len(part.words), dtype=np.uint32)
        for place in np.unique(np.concatenate([part.train["word"], part.test["word"]])).tolist():
            numbers[place] = self._number(part.words[place])
        for buckets, records in zip(self.buckets.values(), (part.train, part.test), strict=True):
            records["word"] = numbers[records["word"]]
            buckets.add(records)
            drawings = records[records["copy"] == 0]
            for number, count in enumerate(np.bincount(drawings["word"], minlength=len(self.words)).tolist()):
                if self._per_word is None:
                    self.counts[number] += count
                elif count:
                    keys = np.append(self._smallest[number], drawings["key"][drawings["word"] == number])
                    self._smallest[number] = np.unique(keys)[: self._per_word]
                    # Not those that were added: how many exceed the limit of that moment depends on the workers.
                    self.counts[number] = len(self._smallest[number])

    def _number(self, word: str) -> int:
        if word not in self._numbers:
            self._numbers[word] = len(self.words)
            self.words.append(word)
            self.counts.append(0)
            self._smallest.append(np.empty(0, dtype=np.uint64))
        return self._numbers[word]


def collect(
    files: Sequence[InputFile],
    rasteriser: Rasteriser,
    folder: Path,
    *,
    per_word: int | None,
    reserved: Collection[str],
    workers: int,
) -> Collected:
    """Read the files into buckets in `folder`, which is made. Memory does not grow with their number.

    Args:
        per_word: most drawings to take of each word.
        reserved: special tokens, which no word may hold.

    Raises InputError that names the first line that is not a drawing, or a word that no sketch can have."""
    collected = Collected(folder, per_word)
    with tqdm(unit=" drawings", unit_scale=True, disable=None) as bar:

        def pieces() -> Iterator[tuple[Lines, dict[str, int]]]:
            for number, file in enumerate(files, 1):
                bar.set_description(f"file {number} of {counted(len(files), 'file')}"[:40])
                for lines in lines_of(file):
                    yield lines, collected.limits_by_word()

        for part in in_order(rasteriser, pieces(), workers):
            for word in part.words:
                if word not in collected.seen:
                    check_word(word, list(reserved), f"{part.name}: the word")
            collected.add(part)
            bar.update(part.read)
    for buckets in collected.buckets.values():
        buckets.close()
    return collected
