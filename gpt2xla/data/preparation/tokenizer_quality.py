"""How good a tokenizer is: how much text a token of it holds, and whether it loses any text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from gpt2xla.data.tokenizer import Tokenizer

_EVERY = 100
_MOST_BYTES = 10_000_000
_CHARACTERS = 50_000
_OF_EACH = 5_000
_SHOWN_BEFORE, _SHOWN_AFTER = 10, 30


class HeldOut:
    """Keeps each 100th document of a stream, up to 10 MB of them, to measure a tokenizer on text it was not trained on.

    Attributes:
        documents, bytes: the documents kept, and their size as UTF-8.
    """

    def __init__(self) -> None:
        self.documents: list[str] = []
        self.bytes = 0

    def others(self, documents: Iterable[str]) -> Iterator[str]:
        """Yield the documents of a stream, without each 100th."""
        for number, document in enumerate(documents, 1):
            if number % _EVERY:
                yield document
                continue
            size = len(document.encode("utf-8", errors="replace"))
            if self.bytes + size <= _MOST_BYTES:
                self.documents.append(document)
                self.bytes += size

    def bytes_per_token(self, tokenizer: Tokenizer) -> float:
        return self.bytes / sum(len(tokenizer.encode(document)) for document in self.documents)


def first_loss(tokenizer: Tokenizer, documents: Iterable[str]) -> tuple[str, str] | None:
    """Return a snippet of the first text that its ids do not give back, and what they give; None if none is lost.

    A tokenizer with an unknown token, or one that lowers case, loses text, and the model learns what is left. The check
    covers 50,000 characters and ignores spaces around a document, which some tokenizers add or remove.
    """
    seen = 0
    for document in documents:
        text = document[:_OF_EACH].strip()
        seen += len(text)
        back = tokenizer.decode(tokenizer.encode(text)).strip()
        if back != text:
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, back, strict=False)))
            shown = slice(max(0, same - _SHOWN_BEFORE), same + _SHOWN_AFTER)
            return text[shown], back[shown]
        if seen >= _CHARACTERS:
            break
    return None
