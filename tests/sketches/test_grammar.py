"""The grammar of pictures against a plain reading of the text that ids decode to, id by id."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from sketch_tokenizers import format_for
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as HFTokenizer

from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.sketches.format import SketchFormat
from gpt2xla.sketches.grammar import PictureGrammar
from gpt2xla.sketches.tokenizer import SPECIAL_TOKENS


def begins_picture(format: SketchFormat, ids: list[int], text: str) -> bool:
    """Whether some picture's text begins so, as far as it is known: single pixels and newlines can complete it."""
    del ids
    *whole, last = text.split("\n")
    fits = len(whole) < format.size and all(len(row) == format.size for row in whole) and len(last) <= format.size
    return fits and not set(text) - set("01\n")


def begins_ids_of_picture(format: SketchFormat, ids: list[int], text: str) -> bool:
    """Whether the tokenizer encodes some picture so: the one of these pixels, and no ink after them."""
    size = format.size
    if set(text) - set("01") or len(text) > size**2:
        return False
    pixels = text.ljust(size**2, "0")
    encoded = format.tokenizer.encode("\n".join(pixels[start : start + size] for start in range(0, size**2, size)))
    return encoded[: len(ids)] == ids


def drawn_at_random(
    format: SketchFormat, truth: Callable[[SketchFormat, list[int], str], bool], seed: int, compare_at: set[int] | None
) -> None:
    """Draw a picture of allowed ids; at the steps `compare_at`, None for all, compare each id there is with the truth."""
    grammar, tokenizer, chance = PictureGrammar(format), format.tokenizer, random.Random(seed)
    ids: list[int] = []
    while True:
        allowed, before = grammar.allowed(ids).tolist(), tokenizer.decode(ids)
        assert len(allowed) == tokenizer.vocab_size
        if compare_at is None or len(ids) in compare_at:
            each = [[*ids, i] for i in range(tokenizer.vocab_size)]
            texts = tokenizer.backend.decode_batch(each, skip_special_tokens=False)
            ends = before.replace("\n", "") == before and len(before) == format.size**2
            ends |= [len(line) for line in before.split("\n")] == [format.size] * format.size
            wrong = [
                (i, text)
                for i, text in enumerate(texts)
                if allowed[i] != (ends if i == format.img_end else text != before and truth(format, each[i], text))
            ]
            assert wrong == []
        ids.append(chance.choice([i for i, is_allowed in enumerate(allowed) if is_allowed]))
        if ids[-1] == format.img_end:
            break
    picture = format.picture(ids[:-1])
    assert picture.shape == (format.size, format.size)


@pytest.mark.parametrize(("kind", "size"), [("bytes", 4), ("bytes", 6), ("rows", 8)])
def test_an_id_may_follow_if_and_only_if_the_text_stays_that_of_a_picture(kind: str, size: int) -> None:
    for seed in range(3):
        drawn_at_random(format_for(kind, size), begins_picture, seed, None)


@pytest.mark.slow
def test_so_it_is_for_gpt2s_tokenizer(gpt2_encoding: str) -> None:
    format = format_for(gpt2_encoding, 24)
    drawn_at_random(format, begins_picture, 0, {0, 1, 5, 11, 12, 50})
    drawn_at_random(SketchFormat(format.tokenizer, 4, format.words), begins_picture, 1, None)


@pytest.mark.parametrize("size", [4, 9, 12])
def test_of_a_trained_tokenizer_the_pieces_stand_where_it_would_put_them(size: int) -> None:
    drawn_at_random(format_for("trained", size), begins_ids_of_picture, size, None)


def test_nothing_is_allowed_after_which_no_tokens_complete_the_row() -> None:
    """A tokenizer without single pixels: brute force over all sequences of its tokens."""
    texts = ["<unk>", "00", "01", "10", "11", "000", "111", "0\n", "\n", "\n0", "00\n00"]
    backend = HFTokenizer(models.Unigram([(text, -1.0) for text in texts], unk_id=0, byte_fallback=False))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|endoftext|>", *SPECIAL_TOKENS)])
    format = SketchFormat(Tokenizer("no single pixels", backend, {}), 4, [])

    def completes(text: str) -> bool:
        shape = text.replace("1", "0")
        if not "\n".join(["0000"] * 4).startswith(shape):
            return False
        return len(text) == 19 or any(completes(shape + more) for more in set(shapes))

    shapes = [text.replace("1", "0") for text in texts[1:]]
    grammar = PictureGrammar(format)
    states: list[list[int]] = [[]]
    seen = set()
    for ids in states:  # which grow meanwhile
        text = "".join(texts[i] for i in ids)
        if (len(text), text[-1:]) in seen:
            continue
        seen.add((len(text), text[-1:]))
        allowed = grammar.allowed(ids).tolist()
        for i in range(1, len(texts)):
            assert allowed[i] == completes(text + texts[i]), (text, texts[i])
        assert allowed[format.img_end] == (len(text) == 19)
        states += [[*ids, i] for i in range(1, len(texts)) if allowed[i]]
    assert len(seen) > 10
