"""Decides what goes to `test/`: documents drawn by their numbers, and as much of the corpus's end as a useful loss needs.

The draw gives one of a hundred documents, which is 1% of a large corpus. Of few or long documents it may give next to
nothing. What is missing is known only at the end of the corpus, so the newest blocks are held back until then.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gpt2xla.data.documents.corpus import Block
from gpt2xla.data.preparation.chance import uniform
from gpt2xla.data.preparation.encoder import Encoded, Encoder
from gpt2xla.data.validation_size import USEFUL_TOKENS, noise_of
from gpt2xla.errors import counted

DRAWN_SHARE = 0.01  # of the documents, unless --test-fraction says otherwise
_AMPLE_TOKENS = 1_000_000  # no test split needs more, however large the corpus
_LEAST_SHARE, _MOST_SHARE = 0.01, 0.1  # of the corpus's tokens
_NOT_CUT = 1_000  # tokens: shorter documents stay whole


@dataclass
class Assigned:
    """A block, its documents as ids, and for each whether it goes to test/."""

    block: Block
    encoded: Encoded
    is_test: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each document."""
        return np.diff(self.encoded.ends, prepend=0)


class Splitter:
    """Assigns the documents of a corpus, block by block.

    Args:
        fraction: the share of documents to draw. None draws 1%, and tops up what they give.
        most: the largest number of tokens in test/, for documents that are drawn.
        documents, train, test: what is written already: documents, and the tokens of each split.
        is_free: whether parts of the corpus belong to no split of their own."""

    def __init__(
        self,
        fraction: float | None,
        most: int,
        seed: int,
        encoder: Encoder,
        say: Callable[[str], None],
        *,
        documents: int,
        train: int,
        test: int,
        is_free: bool,
    ) -> None:
        self._fraction = DRAWN_SHARE if fraction is None else fraction
        self._is_free, self._is_topped_up = is_free, fraction is None and is_free
        self._most, self._seed, self._encoder, self._say = most, seed, encoder, say
        self.documents, self.train, self.test = documents, train, test  # also those that are held back
        self._held: deque[Assigned] = deque()

    def add(self, block: Block, encoded: Encoded) -> Iterator[Assigned]:
        """Assign the documents of the next block, and yield the blocks that are final."""
        new = Assigned(block, encoded, self._drawn(block, encoded))
        lengths = new.lengths
        self.documents += len(lengths)
        self.test += int(lengths[new.is_test].sum())
        self.train += int(lengths[~new.is_test].sum())
        self._held.append(new)
        # What is missing grows more slowly than the corpus, so what is held now suffices later, too.
        while len(self._held) > 1 and self._missing() <= sum(self._spare(held) for held in list(self._held)[1:]):
            yield self._held.popleft()

    def end(self) -> Iterator[Assigned]:
        """Bring test/ to a useful size with what is held back, and yield the blocks that are left."""
        if self._is_topped_up:
            self._give_back()
        if self._missing():
            self._top_up()
        last = self._held[-1] if self._held else None
        if last and last.block.split is None and self.documents > 1 and not self.test:
            total = counted(self.documents, "document")
            self._say(f"note: none of {total} was drawn for test/ within --test-tokens; the last goes there")
            last.is_test[-1] = True
            self.test = int(last.lengths[-1])
        if 0 < self.test < USEFUL_TOKENS:
            fix = "leave --test-fraction out" if self._is_free and not self._is_topped_up else "give more text"
            if self._is_topped_up and self._most < USEFUL_TOKENS:
                fix = f"allow more than {self._most:,} (--test-tokens, --shard-size)"
            self._say(f"warning: test/ has only {counted(self.test, 'token')}, so {noise_of(self.test)}; {fix}")
        if self._is_topped_up and self.test > 2 * self._ample():
            share = self.test / (self.train + self.test)
            self._say(
                f"warning: test/ has {share:.0%} of the tokens: a long document was drawn; limit it with --test-tokens"
            )
        yield from self._held

    def _drawn(self, block: Block, encoded: Encoded) -> np.ndarray:
        """Return for each document of a block whether it is drawn, or its part belongs to test/."""
        count = len(encoded.ends)
        if block.split:
            return np.full(count, block.split == "test")
        is_test = uniform(self._seed, self.documents, count) < self._fraction
        room, lengths = self._most - self.test, np.diff(encoded.ends, prepend=0)
        for document in np.flatnonzero(is_test):
            if lengths[document] > room:
                is_test[document] = False
            else:
                room -= lengths[document]
        return is_test

    def _missing(self) -> int:
        """Return how many tokens test/ lacks of a useful number."""
        if not self._is_topped_up:
            return 0
        total = self.train + self.test
        wanted = max(USEFUL_TOKENS, min(int(_LEAST_SHARE * total), _AMPLE_TOKENS))
        return max(0, min(wanted, int(_MOST_SHARE * total), self._most) - self.test)

    def _ample(self) -> float:
        """Return how many tokens of a small corpus test/ needs at most."""
        return max(USEFUL_TOKENS, _MOST_SHARE * (self.train + self.test))

    def _give_back(self) -> None:
        """Move drawn documents that are held back to train/, the longest first, while test/ has more than it needs."""
        drawn = [
            (int(held.lengths[document]), number, document)
            for number, held in enumerate(self._held)
            if held.block.split is None
            for document in np.flatnonzero(held.is_test).tolist()
        ]
        for length, number, document in sorted(drawn, reverse=True):
            if self.test > self._ample():
                self._held[number].is_test[document] = False
                self.test, self.train = self.test - length, self.train + length

    def _spare(self, held: Assigned) -> int:
        return int(held.lengths[~held.is_test].sum())

    def _top_up(self) -> None:
        """Move documents from the end of the corpus to test/, and of a long one only a part."""
        drawn, wanted = self.test, self.test + self._missing()
        whole, part = 0, ""
        for held in reversed(self._held):
            for document in np.flatnonzero(~held.is_test)[::-1].tolist():
                missing, length = wanted - self.test, int(held.lengths[document])
                if missing <= 0:
                    break
                is_only, is_long = length == self.train, length > missing + max(wanted // 2, _NOT_CUT)
                is_too_long = self.test + length > self._most
                if (is_only or is_long or is_too_long) and self._cut(held, document, missing):
                    part = "a part of a document"
                    self._move(held, document + 1)
                elif not (is_only or is_too_long):
                    whole += 1
                    self._move(held, document)
        added = " and ".join(filter(None, [counted(whole, "document") if whole else "", part]))
        if added:
            had = counted(drawn, "token")
            self._say(f"note: the documents drawn for test/ had {had}, so the end of the text was added: {added}")

    def _move(self, held: Assigned, document: int) -> None:
        held.is_test[document] = True
        self.test += int(held.lengths[document])
        self.train -= int(held.lengths[document])

    def _cut(self, held: Assigned, document: int, tokens: int) -> bool:
        """Cut a document in two, at the end of a line or word, so that the second has at least so many tokens, or a little
        less than --test-tokens allows. Return whether that is possible."""
        text, old, room = held.block.texts[document].as_py(), held.encoded, self._most - self.test
        tokens = min(tokens, room - room // 10)
        wanted = tokens / int(held.lengths[document]) * len(text)  # characters
        while (start := _border(text, len(text) - math.ceil(wanted))) > 0:
            if (count := len(self._encode(text[start:]).ids)) >= tokens:
                break
            wanted *= 1.1
        if start <= 0 or count > room:
            return False
        new = self._encode(text[:start], text[start:])
        first, end = int(old.ends[document - 1]) if document else 0, int(old.ends[document])
        held.encoded = Encoded(
            np.concatenate([old.ids[:first], new.ids, old.ids[end:]]),
            np.concatenate(
                [old.ends[:document], first + new.ends, old.ends[document + 1 :] + first + len(new.ids) - end]
            ),
            np.concatenate([old.sizes[:document], new.sizes, old.sizes[document + 1 :]]),
            old.spelled,
        )
        held.is_test = np.insert(held.is_test, document, False)
        self.documents += 1
        self.train += len(new.ids) - (end - first)
        return True

    def _encode(self, *texts: str) -> Encoded:
        return self._encoder(pa.array(texts, pa.large_string()))


def _border(text: str, start: int) -> int:
    """Return where a line begins in the tenth of the rest before `start`; where none does, a word; else `start`."""
    earliest = max(0, start - (len(text) - start) // 10 - 1)
    for mark in ("\n", " "):
        if (found := text.rfind(mark, earliest, max(0, start))) >= 0:
            return found + 1
    return start
