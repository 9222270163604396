"""Describes what a split holds, in one pass over its tokens: counts, lengths of documents, damage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from gpt2xla.data.shards import TokenStream
from gpt2xla.data.split_folders import split_folder
from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer
from gpt2xla.data.tokenizer_folder import has_tokenizer
from gpt2xla.errors import InputError

_CHUNK = 1 << 20
_MOST_IDS = 1 << 24  # if the vocabulary is unknown: a larger id is taken for damage
_TOKENS_PER_CHARACTER = 4  # at most, with a token per byte


@dataclass
class Contents:
    """What was counted in a split.

    Attributes:
        tokens: how often each id below the vocabulary's size occurs.
        lengths: how many documents have each length in tokens, without end-of-text and without empty documents.
        foreign: number of tokens whose id is not in the vocabulary.
        first_foreign: the position of the first of these.
    """

    tokens: np.ndarray
    lengths: Counter[int] = field(default_factory=Counter)
    foreign: int = 0
    first_foreign: int | None = None

    @property
    def documents(self) -> int:
        return self.lengths.total()

    @property
    def mean_length(self) -> float:
        return sum(length * count for length, count in self.lengths.items()) / self.documents

    def length_quantile(self, share: float) -> int:
        """Return the shortest length that at least `share` of the documents do not exceed."""
        lengths = sorted(self.lengths)
        up_to = np.cumsum([self.lengths[length] for length in lengths])
        return lengths[int(np.searchsorted(up_to, share * up_to[-1]))]

    @property
    def unigram_entropy(self) -> float:
        """The entropy of the ids in nats per token: the loss of the best model that ignores context."""
        shares = self.tokens[self.tokens > 0] / self.tokens.sum()
        return float(-(shares * np.log(shares)).sum())


def contents(stream: TokenStream, vocab_size: int | None, eot_id: int | None) -> Contents:
    """Count all tokens in one pass. Memory holds a chunk, the vocabulary, and the distinct lengths of documents."""
    limit = vocab_size or _MOST_IDS
    found = Contents(np.zeros(vocab_size or 1, dtype=np.int64))
    document = 0  # the start of the current one
    for start in range(0, stream.length, _CHUNK):
        chunk = stream.read(start, min(_CHUNK, stream.length - start)).astype(np.int64)
        if eot_id is not None:
            ends = np.flatnonzero(chunk == eot_id) + start
            _count_lengths(np.diff(ends, prepend=document - 1) - 1, found)
            document = int(ends[-1]) + 1 if len(ends) else document
        foreign = (chunk < 0) | (chunk >= limit)
        if foreign.any():
            found.foreign += int(foreign.sum())
            if found.first_foreign is None:
                found.first_foreign = start + int(foreign.argmax())
            chunk = chunk[~foreign]
        counts = np.bincount(chunk, minlength=len(found.tokens))
        counts[: len(found.tokens)] += found.tokens
        found.tokens = counts
    if eot_id is not None:
        _count_lengths(np.array([stream.length - document]), found)
    return found


def _count_lengths(lengths: np.ndarray, found: Contents) -> None:
    # If end-of-text comes before each document instead (as in llm.c's shards), the first length is 0.
    values, counts = np.unique(lengths[lengths > 0], return_counts=True)
    found.lengths.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def check(stream: TokenStream, found: Contents, verify: bool) -> None:
    """Raise InputError naming a shard with ids beyond the vocabulary, or (`verify`) with another hash than in the manifest.
    Sizes and types were checked when the stream was opened."""
    if found.first_foreign is not None:
        raise InputError(
            f"{stream.file_of(found.first_foreign)} holds ids that are not in the vocabulary ({found.foreign:,} in all "
            "shards): it is damaged, or of another tokenizer; copy or prepare it again"
        )
    if verify and stream.manifest:
        stream.verify()


def tokenizer_of(stream: TokenStream, asked: str | None) -> Tokenizer | None:
    """Return the requested tokenizer, otherwise the one beside the shards, or None. Raises InputError if by the manifest it
    did not make the shards."""
    if not asked and not has_tokenizer(stream.folder):
        return None
    tokenizer = load_tokenizer(asked or str(stream.folder))
    if stream.manifest and not tokenizer.made(stream.manifest):
        other = f"--tokenizer {asked}" if asked else stream.folder / "tokenizer.json"
        right = f"the tokenizer that the manifest names ({stream.manifest.tokenizer})"
        raise InputError(f"{other} is not {right}; give that one, or prepare the data again")
    return tokenizer


def sample(stream: TokenStream, eot_id: int | None, number: int, characters: int) -> Iterator[tuple[int, list[int]]]:
    """Yield positions of documents, evenly spread from the first to the last, each with ids for at least `characters`
    characters of it. Without an end-of-text id they are any positions."""
    seen = set()
    # The last token may be the end-of-text of the last document, and would count as another document.
    for position in np.linspace(0, max(0, stream.length - 2), number, dtype=np.int64).tolist():
        start = position if eot_id is None else _start_of_document(stream, position, eot_id)
        if start in seen:
            continue
        seen.add(start)
        ids = stream.read(start, min(_TOKENS_PER_CHARACTER * characters, stream.length - start))
        if eot_id is not None:
            ids = ids[int(ids[0] == eot_id) :]  # end-of-text before the document
            ids = ids[: int(np.argmax(ids == eot_id)) if (ids == eot_id).any() else None]
        yield start, ids.tolist()


def _start_of_document(stream: TokenStream, position: int, eot_id: int) -> int:
    while position > 0:
        start = max(0, position - _CHUNK)
        ends = np.flatnonzero(stream.read(start, position - start) == eot_id)
        if len(ends):
            return start + int(ends[-1]) + 1
        position = start
    return 0


def splits(folder: str) -> dict[str, TokenStream]:
    """Return the splits in a folder by name: `train/` and `test/` if it has them, otherwise its own shards, whose names may
    be those of two splits (llm.c, nanoGPT). Raises InputError if there are no shards, or some are damaged."""
    if not folder:
        raise InputError("DIR is empty; name a folder, the one you are in as .")
    found = [split_folder(folder, "train", "DIR"), split_folder(folder, "test", "DIR")]
    if below := [split for split in found if split != folder]:
        return {split: TokenStream(split, "DIR") for split in below}
    train, valid = TokenStream(folder, "DIR"), TokenStream(folder, "--valid-dir")
    if train.files == valid.files:
        return {folder: train}
    return {f"{folder} (train)": train, f"{folder} (val)": valid}
