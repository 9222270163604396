"""Encodes blocks of documents as the ids that a split stores, with the fastest encoder for the tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpt2xla.data.special_tokens import SpecialTokensInText, SpelledTokens
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import InputError

# The ids of all documents one after the other, and where each document ends.
Ids = tuple[np.ndarray, np.ndarray]
_CHECKED_BYTES = 1 << 20
# gigatoken keeps every word it has seen: half a GB for each GB of English text. Starting again costs 3% of that time.
_FAST_BYTES = 1 << 30
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_BY_TIKTOKEN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Encoded(NamedTuple):
    """A block of documents as ids.

    Attributes:
        ids: those of all documents, with end-of-text after each if the tokenizer has one.
        ends: where the ids of each document end.
        sizes: the bytes of each document as UTF-8.
        spelled: by document, the special tokens that its text spells and that were taken as text.
    """

    ids: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    spelled: dict[int, Counter[str]]


class Encoder:
    """Encodes blocks. Several threads may call it at once.

    With `special_tokens` "as-ids", special tokens that a text spells become these tokens. With "as-text" and "refuse" they
    are encoded as letters; refusing them is up to the caller.

    Attributes:
        fast: whether gigatoken (the extra `fast`) does the work, and not tiktoken or tokenizers.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens: SpecialTokensInText = "as-text") -> None:
        as_ids = special_tokens == "as-ids"
        self.tokenizer = tokenizer.reading_special_tokens() if as_ids else tokenizer
        self._spelled = SpelledTokens(t for t, is_special in tokenizer.added.items() if is_special and not as_ids)
        # gigatoken does not know added tokens, so it cannot encode blocks in which the tokenizer would match one.
        self._matched = SpelledTokens(t for t, is_special in tokenizer.added.items() if as_ids or not is_special)
        fast = _gigatoken(tokenizer)
        self.fast = fast is not None
        self._encode = fast or self._reference
        self._encoded_bytes = 0

    def __call__(self, texts: pa.LargeStringArray) -> Encoded:
        self._encoded_bytes += texts.nbytes
        if self.fast and self._encoded_bytes > _FAST_BYTES:
            self._encoded_bytes = 0
            self._encode = _gigatoken(self.tokenizer) or self._reference
        encode = self._reference if self.fast and self._matched.found_in(texts).true_count else self._encode
        ids, ends = encode(texts)
        ids = ids.astype(self.tokenizer.dtype, copy=False)
        if self.tokenizer.eot_id is not None:
            ids = np.insert(ids, ends, self.tokenizer.eot_id)
            ends = ends + np.arange(1, len(ends) + 1)
        return Encoded(ids, ends, pc.binary_length(texts).to_numpy(), self._spelled.count_each(texts))

    def check(self, texts: pa.LargeStringArray) -> bool:
        """Tell whether the fast encoder gives the tokenizer's own ids for the first MB of documents. If not, it is not used
        again."""
        first = np.searchsorted(np.cumsum(pc.binary_length(texts).to_numpy()), _CHECKED_BYTES) + 1
        texts = self._matched.blanked(texts[:first])
        expected = self._reference(texts)
        try:
            same = all(np.array_equal(a, b) for a, b in zip(self._encode(texts), expected, strict=True))
        except Exception:  # the release may have another interface
            same = False
        if not same:
            self._encode, self.fast = self._reference, False
        return same

    def _reference(self, texts: pa.LargeStringArray) -> Ids:
        try:
            documents = self.tokenizer.encode_batch(texts.to_pylist())
        except Exception as error:  # the Rust libraries raise bare Exception for everything
            raise InputError(f"tokenizer {self.tokenizer.name} cannot encode this text: {error}") from None
        ends = np.cumsum([len(ids) for ids in documents], dtype=np.int64)
        return np.concatenate([np.asarray(ids, dtype=np.uint32) for ids in documents]), ends


def _gigatoken(tokenizer: Tokenizer) -> Callable[[pa.LargeStringArray], Ids] | None:
    """Return gigatoken's encoder for a byte-level byte-pair tokenizer; None if it is missing or cannot encode this one."""
    try:
        import awkward as ak
        import gigatoken
    except ImportError:
        return None
    definition = json.loads(tokenizer.backend.to_str())
    byte_level = (definition["decoder"] or {}).get("type") == "ByteLevel" and not definition["normalizer"]
    if definition["model"]["type"] != "BPE" or not byte_level:
        return None
    definition["added_tokens"] = []  # it would encode "<|endoftext|>" in a text as this token
    definition["pre_tokenizer"] = _as_published(definition["pre_tokenizer"])
    try:
        backend = gigatoken.Tokenizer.from_json(json.dumps(definition))
    except (RuntimeError, ValueError, TypeError, AttributeError):  # the release may have another interface
        return None

    def encode(texts: pa.LargeStringArray) -> Ids:
        _, offsets, text = texts.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
        characters = ak.contents.NumpyArray(np.frombuffer(text, dtype=np.uint8), parameters={"__array__": "char"})
        documents = ak.contents.ListOffsetArray(
            ak.index.Index64(bounds), characters, parameters={"__array__": "string"}
        )
        encoded = backend.encode_batch(ak.Array(documents), parallel=False).layout
        starts = encoded.offsets.data
        return encoded.content.data[starts[0] : starts[-1]], starts[1:] - starts[0]

    return encode


def _as_published(pre_tokenizer: dict) -> dict:
    """Write GPT-2's rule for splitting words in the form that gigatoken knows. tiktoken writes the same rule so that its own
    engine does not backtrack."""
    for step in pre_tokenizer.get("pretokenizers", []):
        if step.get("pattern", {}).get("Regex") == _GPT2_BY_TIKTOKEN:
            step["pattern"]["Regex"] = _GPT2
    return pre_tokenizer
