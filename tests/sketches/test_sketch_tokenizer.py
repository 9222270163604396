"""The tokenizer that is trained along with drawings."""

from __future__ import annotations

import pytest

from gpt2xla.errors import InputError
from gpt2xla.sketches.format import SketchFormat
from gpt2xla.sketches.tokenizer import train_tokenizer

COUNTS = {"apple": 5, "banana": 9, "pineapple": 9, "apple tree": 1, "tree house": 2, "house plant": 2}


def test_words_are_tokens_as_far_as_there_is_room_the_most_frequent_first() -> None:
    pieces = 256 + 256  # bytes and pieces
    for room, single in ((0, 0), (1, 1), (2, 2), (3, 3), (6, 6), (20, 6)):
        tokenizer = train_tokenizer(COUNTS, 24, pieces + room + 5)
        assert tokenizer.vocab_size <= pieces + room + 5
        found = {word for word in COUNTS if len(tokenizer.encode(word)) == 1}
        by_frequency = ["banana", "pineapple", "apple", "house plant", "tree house", "apple tree"]
        assert found == set(by_frequency[:single])
        assert SketchFormat.of(tokenizer).has_single_tokens == (single == 6)
        for word in (*COUNTS, "trees", "ü 01"):
            assert tokenizer.decode(tokenizer.encode(word)) == word
    assert len(tokenizer.encode("treehouses")) < len("treehouses")  # merges
    assert tokenizer.special_tokens["eos_token"] == "<|endoftext|>"


def test_the_order_of_the_words_changes_nothing() -> None:
    turned = dict(reversed(COUNTS.items()))
    one, two = (train_tokenizer(counts, 20, 600) for counts in (COUNTS, turned))
    assert one.backend.to_str() == two.backend.to_str()
    assert one.sketches == two.sketches == {"size": 20, "words": sorted(COUNTS), "stroke_width": 1}


def test_pieces_have_room_or_the_least_is_named() -> None:
    least = 256 + 256 + 2**4 + 5
    assert train_tokenizer(COUNTS, 28, least).vocab_size == least
    with pytest.raises(InputError, match=f"--vocab-size {least - 1}: .* at least {least}"):
        train_tokenizer(COUNTS, 28, least - 1)
    assert train_tokenizer(COUNTS, 5, 400).vocab_size <= 400  # pieces of 5 pixels alone


@pytest.mark.parametrize("word", ["", "a<MSGEND>", "a\nb", "<|endoftext|>"])
def test_a_word_that_could_be_read_as_something_else_is_refused(word: str) -> None:
    with pytest.raises(InputError, match="the word"):
        train_tokenizer({"cat": 1, word: 1}, 24, 1024)
