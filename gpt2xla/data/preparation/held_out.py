"""Documents kept out of a tokenizer's training, to measure it on text that it has not seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gpt2xla.data.tokenizer import Tokenizer

EVERY = 100
MOST_BYTES = 10_000_000


class HeldOut:
    """Each 100th document of a stream. Of these the first 10 MB are remembered; none of them is passed on.

    Attributes:
        documents, bytes: what is remembered, and its size as UTF-8.
    """

    def __init__(self) -> None:
        self.documents: list[str] = []
        self.bytes = 0

    def others(self, documents: Iterable[str]) -> Iterator[str]:
        for number, document in enumerate(documents, 1):
            if number % EVERY:
                yield document
                continue
            size = utf8_size(document)
            if self.bytes + size <= MOST_BYTES:
                self.documents.append(document)
                self.bytes += size

    def bytes_per_token(self, tokenizer: Tokenizer) -> float:
        return self.bytes / sum(len(tokenizer.encode(document)) for document in self.documents)


def utf8_size(text: str) -> int:
    return len(text.encode("utf-8", errors="replace"))
