"""Text as it is handed out while a model writes it: stop strings and characters of several tokens."""

import copy
import random

import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models

from gpt2xla.config import ModelConfig
from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer
from gpt2xla.errors import InputError
from gpt2xla.generation.continuation import Continuation, continue_texts, text_prompt
from gpt2xla.generation.sampling import SamplingConfig
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2

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


def test_a_text_never_breaks_a_character() -> None:
    text = "a é 北 🙂 end"
    ids = BYTES.encode(text)
    growing = Continuation(BYTES, ids[:1])
    parts = [growing.prompt] + [growing.add(token) for token in ids[1:]]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    growing = Continuation(BYTES, [])
    assert growing.add(0xE5) == ""
    assert growing.rest() == "\ufffd"


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


def test_an_empty_prompt_begins_after_an_end_of_text_which_is_not_shown(model: GPT2) -> None:
    ends = GenerationSettings.of(BYTES)
    assert text_prompt(BYTES, "", 1, ends, 320).ids == [256]
    assert text_prompt(BYTES, "", 1, GenerationSettings({}, {"bos_token_id": 7}), 320).ids == [7]
    (text,) = continue_texts(model, BYTES, [""], 1, SamplingConfig())
    assert text.prompt == ""
    without_one = copy.copy(BYTES)
    without_one.eot_id, without_one.special_tokens = None, {}
    with pytest.raises(InputError, match="--prompt is empty"):
        text_prompt(without_one, "", 1, GenerationSettings.of(without_one), 320)


@pytest.fixture(scope="module")
def long_tokens() -> Tokenizer:
    """Tokens that end and begin inside characters and words: byte pairs of random cuts."""
    text = "ab é🙂 abba 🙂🙃é babéa" * 20
    words = {text.encode()[i : i + n] for n in (2, 3, 4) for i in range(60)}
    spell = {byte: char for char, byte in BYTES.backend.get_vocab().items() if char != "<|endoftext|>"}
    vocab = dict.fromkeys(
        [*(spell[byte] for byte in range(256)), *("".join(spell[byte] for byte in word) for word in sorted(words))]
    )
    backend = HFTokenizer(models.BPE({word: number for number, word in enumerate(vocab)}, []))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer("long", backend, {})


def test_any_cut_into_tokens_gives_the_same_text(long_tokens: Tokenizer) -> None:
    """Against the text of all ids at once: cut before the stop string that is the first to be complete."""
    draw = random.Random(0)
    for _ in range(400):
        ids = draw.choices(range(long_tokens.vocab_size), k=draw.randint(0, 12))
        prompt = draw.choices(range(97, 100), k=draw.randint(0, 2))
        text = long_tokens.decode(prompt + ids)[len(prompt) :]
        stop = tuple(text[i : i + draw.randint(1, 5)] or "a" for i in draw.choices(range(len(text) + 1), k=2))
        stop = (*(s for s in stop if "\ufffd" not in s), "zz")
        growing = Continuation(long_tokens, prompt, stop)
        pieces = []
        for token in ids:
            pieces.append(growing.add(token))
            if growing.stopped:
                break
        pieces.append(growing.rest())
        ends = sorted((text.find(s) + len(s), text.find(s)) for s in stop if s in text)
        assert "".join(pieces) == growing.text == (text[: ends[0][1]] if ends else text), (text, stop)
        assert growing.stopped == bool(ends)
