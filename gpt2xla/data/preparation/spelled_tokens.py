"""Special tokens that documents spell, over a whole preparation: counted, or a reason to stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from gpt2xla.data.documents.corpus import Part, Position, blocks
from gpt2xla.data.special_tokens import SpecialTokensInText, warning
from gpt2xla.errors import InputError


class SpelledInCorpus:
    """Adds to `counts`, which an interrupted preparation keeps; says so when the first are met, and at the end."""

    def __init__(self, mode: SpecialTokensInText, counts: Counter[str], say: Callable[[str], None]) -> None:
        self.mode, self.counts, self._say = mode, counts, say
        self._said: Counter[str] = Counter()

    def add(self, spelled: Mapping[int, Counter[str]], parts: Sequence[Part], start: Position) -> None:
        """What the documents of a block spell, by their number in it; it begins at `start`.

        Raises:
            InputError: they are to be refused.
        """
        if not spelled:
            return
        if self.mode == "refuse":
            document, found = next(iter(spelled.items()))
            name, number = _place(parts, start, document)
            raise InputError(
                f"{name}, document {number + 1}: it spells the special token {next(iter(found))}; remove it there, or use "
                "--special-tokens-in-text as-text or as-ids"
            )
        is_first = not self.counts
        for found in spelled.values():
            self.counts.update(found)
        if is_first:
            self._said = Counter(self.counts)
            self._say(warning(self.counts, "the text so far"))

    def end(self) -> None:
        if self.counts != self._said:
            self._say(warning(self.counts, "the whole text"))


def _place(parts: Sequence[Part], start: Position, document: int) -> tuple[str, int]:
    """The part of a document, by its number after `start`, and its number there: read again, as blocks do not say."""
    before = start.documents
    for part in parts[start.part :]:
        for block in blocks([part], Position(0, before)):
            if document < len(block.texts):
                return part.name, before + document
            document, before = document - len(block.texts), before + len(block.texts)
        before = 0
    raise AssertionError("the document is beyond the corpus")
