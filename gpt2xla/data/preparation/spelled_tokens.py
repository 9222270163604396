"""Counts special tokens that documents spell over a whole preparation, or stops at the first one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from gpt2xla.data.documents.corpus import Part, Position, blocks
from gpt2xla.data.special_tokens import SpecialTokensInText, warning
from gpt2xla.errors import InputError


class SpelledInCorpus:
    """Adds to `counts`, which a resumed preparation continues. Warns when the first are found, and at the end."""

    def __init__(self, mode: SpecialTokensInText, counts: Counter[str], say: Callable[[str], None]) -> None:
        self.mode, self.counts, self._say = mode, counts, say
        self._said: Counter[str] = Counter()

    def add(self, spelled: Mapping[int, Counter[str]], parts: Sequence[Part], start: Position) -> None:
        """Add what the documents of a block spell, by their number in it. The block begins at `start`. Raises InputError,
        naming the first document that spells a special token, if these are to be refused."""
        if not spelled:
            return
        if self.mode == "refuse":
            document, found = next(iter(spelled.items()))
            name, number = _place(parts, start, document)
            wrong = f"it spells the special token {next(iter(found))}"
            fix = "remove it there, or use --special-tokens-in-text as-text or as-ids"
            raise InputError(f"{name}, document {number + 1}: {wrong}; {fix}")
        is_first = not self.counts
        for found in spelled.values():
            self.counts.update(found)
        if is_first:
            self._said = Counter(self.counts)
            self._say(warning(self.counts, "the text so far"))

    def end(self) -> None:
        """Warn about the whole text, unless the last warning counted all of it."""
        if self.counts != self._said:
            self._say(warning(self.counts, "the whole text"))


def _place(parts: Sequence[Part], start: Position, document: int) -> tuple[str, int]:
    """Return the part of a document and its number there, given its number after `start`. Blocks do not record this, so the
    text is read again."""
    before = start.documents
    for part in parts[start.part :]:
        for block in blocks([part], Position(0, before)):
            if document < len(block.texts):
                return part.name, before + document
            document, before = document - len(block.texts), before + len(block.texts)
        before = 0
    raise AssertionError("the document is beyond the corpus")
