"""Tokenizers against tiktoken and transformers, and text that survives the way there and back."""

import json
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer
from transformers import AutoTokenizer, GPT2TokenizerFast

from gpt2xla.data.tokenizer import load_tokenizer, train_bpe
from gpt2xla.errors import InputError

SAMPLES = [
    "Hello, world!", "  two  spaces\n\n\ttabs", "naïve café 北京 🙂🙃 e\u0301",
    "def f(x):\n    return x + 1\n", "I'm you'll",
    "1234567", "<|endoftext|> written out", "", " ", "\r\n\x00\x7f",
]  # fmt: skip


def test_gpt2_equals_tiktoken_and_its_saved_form_in_transformers(gpt2_encoding: str, tmp_path: Path) -> None:
    ours, truth = load_tokenizer(gpt2_encoding), tiktoken.get_encoding("gpt2")
    assert (ours.vocab_size, ours.eot_id) == (50257, 50256)
    ours.save(tmp_path)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    assert theirs.eos_token_id == 50256
    assert (again.name, again.sha256) == ("gpt2", ours.sha256)
    sources = [file.read_text() for file in Path(__file__).parent.rglob("*.py")]
    for text in SAMPLES + sources:
        ids = truth.encode_ordinary(text)
        assert ours.encode(text) == ids
        assert again.encode(text) == ids
        assert ours.decode(ids) == text
        if "<|" not in text:
            assert theirs(text)["input_ids"] == ids


def test_gpt2_from_openais_own_files_counts_as_the_same(gpt2_encoding: str, tmp_path: Path) -> None:
    """Another library's tokenizer.json of the same vocabulary and merges must not be taken for a foreign tokenizer."""
    ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    load_tokenizer(gpt2_encoding).save(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert len(model["merges"]) == len(ranks) - 256
    theirs = GPT2TokenizerFast(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_tokenizer(str(tmp_path / "theirs")).sha256 == load_tokenizer(gpt2_encoding).sha256


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_bytes_are_utf8(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode(text) == list(text.encode("utf-8", errors="replace"))
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)


def test_text_survives_a_trained_tokenizer_and_its_file(tmp_path: Path) -> None:
    documents = [file.read_text() for file in Path(__file__).parent.rglob("*.py")]
    tokenizer = train_bpe(documents, "mine", vocab_size=600, min_frequency=2)
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (600, 599)
    tokenizer.save(tmp_path)
    again, theirs = load_tokenizer(str(tmp_path / "tokenizer.json")), AutoTokenizer.from_pretrained(tmp_path)
    assert (again.name, again.sha256) == ("mine", tokenizer.sha256)
    for text in SAMPLES + documents:
        ids = tokenizer.encode(text)
        assert 599 not in ids, "end of text written out in a document is text"
        assert tokenizer.decode(ids) == text
        assert again.encode(text) == ids
        if "<|" not in text:
            assert theirs(text)["input_ids"] == ids


def test_special_tokens_follow_end_of_text_and_transformers_knows_them(tmp_path: Path) -> None:
    documents = [file.read_text() for file in Path(__file__).parent.rglob("*.py")]
    tokenizer = train_bpe(documents, "mine", 600, 2, ["<|user|>", "<pad>"])
    tokenizer.save(tmp_path)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    assert theirs.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<pad>"]) == [597, 598, 599]
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (597, 597, 600)
    assert {"<|user|>", "<pad>"} <= set(theirs.all_special_tokens)
    assert theirs("a<|user|>b")["input_ids"].count(598) == 1
    assert theirs.decode([598, *tokenizer.encode("hi")], skip_special_tokens=True) == "hi"
    assert 598 not in tokenizer.encode("a<|user|>b"), "written out in a document it is text"
    assert (again.sha256, again.special_tokens) == (tokenizer.sha256, tokenizer.special_tokens)
    for text in documents:
        if "<" not in text:
            assert theirs(text)["input_ids"] == tokenizer.encode(text)


@pytest.mark.parametrize("token", ["the", "<|", "", "<|a b|>", "<|endoftext|>"])
def test_special_tokens_that_text_could_hold_or_that_exist_are_refused(token: str) -> None:
    with pytest.raises(InputError, match="--special-tokens"):
        train_bpe(["the text"], "mine", 300, 1, [token])


def save_like_llama(folder: Path, eos: str | dict) -> None:
    """A folder as Llama's and Qwen's are: no <|endoftext|>, the end named in tokenizer_config.json."""
    backend = HFTokenizer.from_str(load_tokenizer("bytes").backend.to_str().replace("<|endoftext|>", "<|begin|>"))
    backend.add_special_tokens([AddedToken("<|end_of_text|>", special=True, normalized=False)])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("eos", ["<|end_of_text|>", {"__type": "AddedToken", "content": "<|end_of_text|>"}])
def test_end_of_text_is_what_the_config_names(eos: str | dict, tmp_path: Path) -> None:
    save_like_llama(tmp_path / "llama", eos)
    ours, truth = load_tokenizer(str(tmp_path / "llama")), AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert ours.eot_id == truth.eos_token_id == 257
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token, theirs.bos_token) == (truth.eos_token, truth.bos_token)
    assert load_tokenizer(str(tmp_path)).eot_id == 257


def test_an_end_that_the_vocabulary_lacks_is_added_as_transformers_does(tmp_path: Path) -> None:
    save_like_llama(tmp_path / "odd", "<|nowhere|>")
    assert load_tokenizer(str(tmp_path / "odd")).eot_id == AutoTokenizer.from_pretrained(tmp_path / "odd").eos_token_id


def test_a_hub_id_is_found_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--some-one--llama.tiny"
    save_like_llama(model / "snapshots" / ("0" * 40), "<|end_of_text|>")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    tokenizer = load_tokenizer("some-one/llama.tiny")
    assert (tokenizer.name, tokenizer.eot_id) == ("some-one/llama.tiny", 257)
    with pytest.raises(
        InputError, match=r"'some-one/else': .* HF_HUB_OFFLINE is set; unset it, or give the path"
    ) as error:
        load_tokenizer("some-one/else")
    assert "\n" not in str(error.value)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a file"):
        load_tokenizer("no-such-encoding")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path))
