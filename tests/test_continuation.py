"""Text as it is handed out while a model writes it: stop strings and characters of several tokens."""

import random

import pytest
import torch

from gpt2xla import continuation
from gpt2xla.config import ModelConfig
from gpt2xla.continuation import Continuation, continue_texts
from gpt2xla.errors import InputError
from gpt2xla.model import GPT2
from gpt2xla.sampling import SamplingConfig
from gpt2xla.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


def write(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], Continuation]:
    """The pieces that come out when `text` comes in byte by byte."""
    growing = Continuation(BYTES, BYTES.encode("Prompt: "), stop)
    pieces = []
    for token in BYTES.encode(text):
        pieces.append(growing.add(token))
        if growing.stopped:
            break
    return [*pieces, growing.rest()], growing


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("one twthree", ("two", "three"), "one tw"),
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("no stop here, tw", ("two",), "no stop here, tw"),
        ("Ende 🙂 gut", ("🙂",), "Ende "),
        ("stop", ("stop",), ""),
        ("Prompt: x", ("Prompt",), ""),
    ],
)
def test_text_ends_before_the_first_stop_string(text: str, stop: tuple[str, ...], expected: str) -> None:
    pieces, growing = write(text, stop)
    assert "".join(pieces) == growing.text == expected
    assert growing.stopped == (expected != text)
    assert growing.prompt == "Prompt: "


def test_a_stop_string_spans_tokens_wherever_it_lies() -> None:
    """Against a search in the whole text, over random texts of two letters."""
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("ab", k=20))
        stop = tuple("".join(draw.choices("ab", k=draw.randint(1, 5))) for _ in range(draw.randint(1, 3)))
        ends = [text.find(s) + len(s) for s in stop if s in text]
        seen = text[: min(ends)] if ends else text  # until the first one is complete
        first = min((seen.find(s) for s in stop if s in seen), default=len(text))
        assert write(text, stop)[1].text == text[:first]


def test_characters_come_whole() -> None:
    text = "é 🙂 中文 🇩🇪 end"
    pieces, _ = write(text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    pieces, growing = write("a🙂"[:1])
    growing.add(0xF0)
    assert growing.rest() == "\ufffd", "what never became a character is shown at the end"


@pytest.fixture(scope="module")
def model() -> GPT2:
    torch.manual_seed(0)
    model = GPT2(ModelConfig(vocab_size=320, seq_length=64, d_model=32, num_layers=2, num_heads=2)).eval()
    model.init_weights()
    return model


def test_samples_are_those_of_the_next_seeds_and_of_the_prompt_alone(model: GPT2) -> None:
    sampling = SamplingConfig(top_k=50)
    texts = continue_texts(model, BYTES, ["one", "another"], 40, sampling, seed=7, samples=3)
    for row, (prompt, seed) in enumerate((p, s) for p in ("one", "another") for s in (7, 8, 9)):
        (alone,) = continue_texts(model, BYTES, [prompt], 40, sampling, seed=seed)
        assert alone.text == texts[row].text


def test_what_is_shown_is_prompt_and_text(model: GPT2) -> None:
    shown: list[str] = []
    (text,) = continue_texts(model, BYTES, ["one"], 40, SamplingConfig(top_k=50), stop=("zz",), show=shown.append)
    assert "".join(shown) == "one" + text.text


def test_an_empty_prompt_begins_after_an_end_of_text() -> None:
    assert continuation.prompt_ids(BYTES, "") == [256]
    without_one = load_tokenizer("bytes")
    without_one.eot_id = None
    with pytest.raises(InputError, match="--prompt is empty"):
        continuation.prompt_ids(without_one, "")
