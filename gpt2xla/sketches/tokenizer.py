"""Tokenizers for sketches: one that is trained along with the drawings, or a given one with the tokens that it needs.

The trained one cuts each row of pixels into pieces of 8, each of them one token, so that a picture is always the same number
of tokens and a token's position says where it is in the picture. 24x24 pixels are 72 tokens; byte-pair merges of rows, with
as many ids, make 84 on average.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from gpt2xla.data.tokenizer import END_OF_TEXT, Tokenizer, train_bpe
from gpt2xla.errors import InputError

# They stand around the whole, and around the picture in it; white space beside them belongs to them.
SPECIAL_TOKENS = MSGSTART, IMGSTART, IMGEND, MSGEND = "<MSGSTART>", "<IMGSTART>", "<IMGEND>", "<MSGEND>"
PIECE = 8  # pixels of a row that are one token


def train_tokenizer(words: Mapping[str, int], size: int, vocab_size: int) -> Tokenizer:
    """Return a tokenizer for sketches of `size` rows of `size` pixels.

    Its ids, at most `vocab_size`, are the 256 bytes, the pieces of rows, the words, most frequent first, as far as there is
    room, merges for other words, learned from these, then end-of-text and the four special tokens.

    Args:
        words: how many drawings each has.

    Raises InputError if not even the pieces have room, or a word cannot be written (see `check_word`)."""
    special = (END_OF_TEXT, *SPECIAL_TOKENS)
    for word in words:
        check_word(word, special)
    # As many merges as there could be room for; further ones make words that are tokens anyway.
    learned = train_bpe(sorted(words), "words", max(vocab_size, 512) + len(words), min_frequency=2).backend
    definition = json.loads(learned.to_str())["model"]
    vocab = {token: number for token, number in definition["vocab"].items() if number < 256}
    assert len(vocab) == 256
    for piece in (piece for width in _widths(size) for piece in _pieces(width)):
        vocab.setdefault(piece, len(vocab))
    room = vocab_size - len(special)
    if len(vocab) > room:
        least = len(vocab) + len(special)
        raise InputError(f"--vocab-size {vocab_size}: drawings of {size} pixels need at least {least}; give more")
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word in sorted(words, key=lambda word: (-words[word], word)):
        [(token, _)] = spelled.pre_tokenize_str(word)
        if len(vocab) < room:
            vocab.setdefault(token, len(vocab))
    merges = []
    for left, right in definition["merges"]:
        if left + right not in vocab and len(vocab) == room:
            break
        vocab.setdefault(left + right, len(vocab))
        merges.append((left, right))
    backend = HFTokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    name = f"sketches of {size} pixels"
    roles = dict.fromkeys(("bos_token", "unk_token", "eos_token"), END_OF_TEXT)
    return with_sketch_tokens(Tokenizer(name, backend, roles), size, sorted(words))


def with_sketch_tokens(tokenizer: Tokenizer, size: int, words: Sequence[str], stroke_width: int = 1) -> Tokenizer:
    """Return a tokenizer with the four special tokens, if it lacks them, that says which sketches it is for. Raises
    InputError as `Tokenizer.with_special_tokens` does."""
    if missing := [token for token in SPECIAL_TOKENS if token not in tokenizer.added]:
        tokenizer = tokenizer.with_special_tokens(missing, take_white_space=True)
    return tokenizer.with_sketches({"size": size, "words": list(words), "stroke_width": stroke_width})


def piece_ids(tokenizer: Tokenizer, size: int) -> dict[int, np.ndarray] | None:
    """Return the ids of all pieces of rows by their width: those of a width w are (2^w,), at the number that the pixels are
    in binary. None if the tokenizer cuts rows in another way."""
    backend = tokenizer.backend
    same = backend.pre_tokenizer is not None and backend.normalizer is None
    if not same or backend.pre_tokenizer.__getstate__() != _pre_tokenizer().__getstate__():
        return None
    ids = {width: [backend.token_to_id(piece) for piece in _pieces(width)] for width in _widths(size)}
    whole = isinstance(backend.model, models.BPE) and backend.model.ignore_merges
    if not whole or any(number is None for numbers in ids.values() for number in numbers):
        return None
    return {width: np.array(numbers, dtype=tokenizer.dtype) for width, numbers in ids.items()}


def check_word(word: str, tokens: Sequence[str], option: str = "the word") -> None:
    """Raise InputError, which names `option`, unless a word can stand in a sketch's text as it is: nothing in it may be read
    as one of `tokens`, or be lost."""
    if not word.strip():
        raise InputError(f"{option} is empty; write one")
    if word != word.strip() or not word.isprintable():
        raise InputError(
            f"{option} {word[:60]!r} has blanks around it, or characters that cannot be shown; remove them"
        )
    if found := [token for token in tokens if token and token in word]:
        raise InputError(f"{option} {word[:60]!r} spells the special token {found[0]}; remove it")


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Removes newlines, cuts lines of nothing but pixels into pieces, and leaves other lines whole."""
    pieces = f"[01]*[^01][^\\n]*|[01]{{1,{PIECE}}}"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="removed"),
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _widths(size: int) -> tuple[int, ...]:
    """Return the widths of the pieces that rows are cut into."""
    return tuple(width for width in (PIECE if size >= PIECE else 0, size % PIECE) if width)


def _pieces(width: int) -> list[str]:
    return [f"{number:0{width}b}" for number in range(2**width)]
