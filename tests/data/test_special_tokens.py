"""Special tokens that documents and prompts spell: as text, as ids or refused, with transformers' ids."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import run_here, succeed
from tokenizers import AddedToken
from transformers import AutoTokenizer

from gpt2xla.config import ModelConfig
from gpt2xla.data.documents.corpus import local_parts
from gpt2xla.data.preparation.encoder import Encoder
from gpt2xla.data.preparation.pipeline import PrepareConfig, prepare
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.special_tokens import SpecialTokensInText, SpelledTokens
from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from gpt2xla.errors import InputError
from gpt2xla.generation.prompt_file import TextReader
from gpt2xla.generation.settings import GenerationSettings

DOCUMENTS = [
    "the cat <|user|>sat<|bot|> on",
    "<think> the mat</think>",
    "plain",
    "<|endoftext|><|user|><|user|>",
    "<|user",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two special tokens, and two that are matched in text in any case."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_bpe(["the cat sat on the mat"], "mine", 300, 1, ["<|user|>", "<|bot|>"])
    trained.backend.add_tokens([AddedToken("<think>", rstrip=True), AddedToken("</think>", lstrip=True)])
    trained.save(folder)
    return folder


def truth(folder: Path, mode: SpecialTokensInText, text: str) -> list[int]:
    theirs = AutoTokenizer.from_pretrained(folder, split_special_tokens=mode != "as-ids")
    return theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("mode", ["as-text", "as-ids", "refuse"])
def test_blocks_are_encoded_as_transformers_does(mode: SpecialTokensInText, folder: Path) -> None:
    """Also by gigatoken, where it is installed, which knows no added tokens."""
    tokenizer = load_tokenizer(str(folder))
    encoder = Encoder(tokenizer, mode)
    for documents in (DOCUMENTS, DOCUMENTS[2:3], DOCUMENTS[:1], DOCUMENTS[1:2]):
        texts = pa.array(documents, pa.large_string())
        assert not encoder.fast or encoder.check(texts)
        encoded = encoder(texts)
        expected = [id_ for text in documents for id_ in [*truth(folder, mode, text), tokenizer.eot_id]]
        assert encoded.ids.tolist() == expected
        counted = {n: Counter(re.findall(r"<\|user\|>|<\|bot\|>|<\|endoftext\|>", t)) for n, t in enumerate(documents)}
        assert encoded.spelled == {n: c for n, c in counted.items() if c and mode != "as-ids"}


def test_openais_encoding_reads_them_as_transformers_does(gpt2_encoding: str, tmp_path: Path) -> None:
    ours = load_tokenizer(gpt2_encoding)
    ours.save(tmp_path)
    for text in ("a<|endoftext|>b", "<|endoftext|><|endoftext|>", "<|endoftext", "plain"):
        assert ours.encode(text) == truth(tmp_path, "as-text", text)
        assert list(ours.reading_special_tokens().encode(text)) == truth(tmp_path, "as-ids", text)


def test_any_signs_may_be_in_a_token() -> None:
    spelled = SpelledTokens(["[a.b]*", "<|x|>", "<|x|>y", "^$\\", "#-&~ é", "(?{1}+)"])
    texts = ["[a.b]* <|x|>y<|x|>", "^$\\^$\\ #-&~ é", "(?{1}+)", "ab <x>", ""]
    expected = [{"[a.b]*": 1, "<|x|>": 1, "<|x|>y": 1}, {"^$\\": 2, "#-&~ é": 1}, {"(?{1}+)": 1}, {}, {}]
    assert [spelled.count(text) for text in texts] == expected
    counted = spelled.count_each(pa.array(texts, pa.large_string()))
    assert counted == {number: counts for number, counts in enumerate(expected) if counts}
    assert SpelledTokens([]).count_each(pa.array(texts, pa.large_string())) == {}


def prepared(
    tmp_path: Path, tokenizer: Tokenizer, mode: SpecialTokensInText, lines: list[str], **options: object
) -> list[str]:
    (tmp_path / "b.txt").write_text("\n".join(lines))
    (tmp_path / "a.txt").write_text("nothing here\nnor here\n")
    config = PrepareConfig(output_dir=str(tmp_path / "out"), special_tokens_in_text=mode, test_fraction=0.3, **options)  # type: ignore[arg-type]
    said: list[str] = []
    prepare(local_parts([tmp_path / "a.txt", tmp_path / "b.txt"], split_by="line"), tokenizer, config, said.append)
    return [line for line in said if "special" in line]


def test_a_preparation_counts_them_or_makes_them_tokens(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    lines = ["<|user|>hello there<|bot|>hi"] * 30
    (tmp_path / "text").mkdir()
    (said,) = prepared(tmp_path / "text", tokenizer, "as-text", lines)
    assert "<|bot|> 30 x, <|user|> 30 x; with --special-tokens-in-text as-ids" in said
    (tmp_path / "ids").mkdir()
    assert prepared(tmp_path / "ids", tokenizer, "as-ids", lines) == []
    for mode, count in (("text", 0), ("ids", 30)):
        streams = [TokenStream(tmp_path / mode / "out" / split) for split in ("train", "test")]
        ids = np.concatenate([stream.read(0, stream.length) for stream in streams])
        assert [(ids == tokenizer.backend.token_to_id(t)).sum() for t in ("<|user|>", "<|bot|>")] == [count, count]
    with pytest.raises(InputError, match="was prepared with --special-tokens-in-text as-text, now as-ids"):
        prepared(tmp_path / "text", tokenizer, "as-ids", lines)


def test_a_preparation_stops_at_one_and_says_where(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    with pytest.raises(InputError, match=r"b\.txt, document 3: it spells the special token <\|bot\|>"):
        prepared(tmp_path, tokenizer, "refuse", ["one", "two", "three <|bot|>", "<|user|>"])
    assert not (tmp_path / "out").exists()
    assert prepared(tmp_path, tokenizer, "refuse", ["one", "<think>", "three"]) == []


def test_only_documents_that_are_taken_are_counted(folder: Path, tmp_path: Path) -> None:
    lines = ["<|user|>", *["plain text"] * 5, "<|user|>" * 9]
    (said,) = prepared(tmp_path, load_tokenizer(str(folder)), "as-text", lines, max_tokens=40)
    assert "<|user|> 1 x;" in said


def test_prompts(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    model = ModelConfig(vocab_size=tokenizer.vocab_size), GenerationSettings.of(tokenizer), None
    said: list[str] = []
    for mode in ("as-text", "as-ids"):
        reader = TextReader(tokenizer, *model, mode, say=said.append)  # type: ignore[arg-type]
        for prompt in ("a<|user|>", "<|bot|>"):
            assert reader.prompt(prompt).ids == truth(folder, mode, prompt)  # type: ignore[arg-type]
    assert len(said) == 1, "once"
    with pytest.raises(InputError, match=r"--prompt 'a<\|user\|>' spells the special token <\|user\|>"):
        TextReader(tokenizer, *model, "refuse").prompt("a<|user|>")
    small = TextReader(tokenizer, ModelConfig(vocab_size=9), *model[1:], "as-ids", "--sample-prompt")
    with pytest.raises(InputError, match=r"--sample-prompt: '<\|user\|>' has the id .* only 9 ids"):
        small.prompt("<|user|>")


def test_generate_follows_special_tokens_in_text(tmp_path: Path) -> None:
    from generation.test_generation_settings import TURN, chat_model

    model = chat_model(tmp_path / "model", {"eos_token_id": TURN}, None, always=65)
    flags = ["--model", model, "--prompt", "<|im_start|>Hi", "--max-new-tokens", 2, "--temperature", 0]
    (tmp_path / "prompts").write_text("<|im_start|>Hi\n")
    by_file = [*flags[:2], *flags[4:], "--prompts-file", tmp_path / "prompts"]
    for mode, ids in (("as-text", 14), ("as-ids", 3)):
        result = run_here("generate.py", *flags, "--special-tokens-in-text", mode)
        assert succeed(result) == "<|im_start|>HiAA\n"
        assert result.stderr.count("warning") == (mode == "as-text")
        line = json.loads(succeed(run_here("generate.py", *by_file, "--special-tokens-in-text", mode)))
        assert (line["prompt_tokens"], line["texts"]) == (ids, ["AA"])
    refused = run_here("generate.py", *flags, "--special-tokens-in-text", "refuse")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
