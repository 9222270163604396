"""The data scripts: what they write, against the text they were given."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run, run_here, succeed, training_losses

from gpt2xla.data import inspection
from gpt2xla.data.inspection import contents
from gpt2xla.data.shards import Manifest, TokenStream
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.files import file_sha256

DOCUMENTS = [f"Document {i}: naïve 🙂 {'text ' * (i % 7)}" for i in range(200)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "sub" / "skipped").mkdir(parents=True)
    for number, document in enumerate(DOCUMENTS):
        (folder / ("sub" if number % 2 else ".") / f"{number:03d}.txt").write_text(document)
    (folder / "sub" / "skipped" / "x.txt").write_text("not this one")
    (folder / "ignored.py").write_text("nor this one")
    return folder


def split_documents(folder: Path) -> list[str]:
    """The documents of a split, decoded from its shards."""
    stream = TokenStream(folder)
    assert stream.manifest is not None
    tokens = stream.read(0, stream.length)
    ends = np.flatnonzero(tokens == stream.manifest.eot_id)
    assert ends[-1] == len(tokens) - 1
    tokenizer = load_tokenizer(str(folder))
    return [tokenizer.decode(part[part != stream.manifest.eot_id].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


def test_prepared_shards_decode_to_the_documents_each_in_one_split(texts: Path, tmp_path: Path) -> None:
    arguments = [
        "--input",
        texts,
        "--exclude",
        "skipped",
        "--tokenizer",
        "bytes",
        "--test-fraction",
        0.2,
        "--shard-size",
        999,
    ]
    succeed(run("scripts/prepare_text.py", *arguments, "--output-dir", tmp_path / "a"))
    train, test = split_documents(tmp_path / "a" / "train"), split_documents(tmp_path / "a" / "test")
    assert sorted(train + test) == sorted(DOCUMENTS)
    assert 20 <= len(test) <= 60

    manifest = Manifest.load(tmp_path / "a" / "train")
    assert manifest is not None
    assert manifest.documents == len(train)
    assert manifest.bytes == sum(len(document.encode()) for document in train)
    assert [shard.tokens for shard in manifest.shards[:-1]] == [999] * (len(manifest.shards) - 1)
    assert all(shard.sha256 == file_sha256(tmp_path / "a" / "train" / shard.file) for shard in manifest.shards)

    succeed(run_here("scripts/prepare_text.py", *arguments, "--output-dir", tmp_path / "b"))
    assert Manifest.load(tmp_path / "b" / "train") == manifest, "the same input gives the same shards"
    again = ["scripts/prepare_text.py", *arguments, "--output-dir", tmp_path / "b"]
    assert "nothing to do" in succeed(run_here(*again))
    other = run_here(*again, "--seed", 5)
    assert other.returncode == 2
    assert "prepared with --seed 1061109567, now 5" in other.stderr


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--input", "no/such/place"], "no/such/place"),
        (["--input", ".ci"], "--input .ci"),
        (["--input", "README.md", "--test-fraction", "1"], "--test-fraction 1"),
        (["--input", "README.md", "--shard-size", "0"], "--shard-size 0"),
        (["--input", "README.md", "--tokenizer", "klingon"], "klingon"),
        (["--input", "README.md", "--test-fraction", "0.1"], "README.md is a single document"),
        ([], "--input"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(flags: list[str], culprit: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run_here("scripts/prepare_text.py", "--tokenizer", "bytes", *flags, "--output-dir", output)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert culprit in result.stderr
    assert not output.exists()


def test_a_tokenizer_is_trained_and_found_beside_the_shards(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    arguments = ["--input", texts, "--output-dir", folder, "--vocab-size", 300]
    assert "297 ids (fewer than requested: no more pairs" in succeed(run("scripts/train_tokenizer.py", *arguments))
    assert run("scripts/train_tokenizer.py", *arguments).returncode == 2
    flags = ["--input", texts, "--tokenizer", folder, "--test-fraction", 0.2, "--output-dir", tmp_path / "data"]
    succeed(run("scripts/prepare_text.py", *flags))
    text = succeed(run_here("scripts/inspect_data.py", tmp_path / "data" / "train"))
    assert "tokenizer tokenizer, 297 ids, end of text 296" in text
    assert "Document " in text


def test_a_tokenizer_is_measured_on_text_that_it_was_not_trained_on(tmp_path: Path) -> None:
    """Each 100th document here is of words that occur nowhere else: the tokenizer must hold none of them."""
    import pyarrow
    from pyarrow import parquet

    documents = [f"zebra giraffe é{i}" if i % 100 == 0 else f"common words again, number {i}" for i in range(1, 351)]
    parquet.write_table(pyarrow.table({"body": documents}), tmp_path / "part.parquet")
    flags = ["--text-column", "body", "--vocab-size", 300, "--special-tokens", "<|user|>", "<|bot|>"]
    out = succeed(
        run(
            "scripts/train_tokenizer.py", "--dataset", tmp_path, *flags, "--max-documents", 250,
            "--output-dir", tmp_path / "a", TIKTOKEN_CACHE_DIR=str(tmp_path / "empty"), HTTPS_PROXY="http://127.0.0.1:9",
        )
    )  # fmt: skip
    tokenizer = load_tokenizer(str(tmp_path / "a"))
    held_out = documents[99:250:100]
    share = sum(len(text.encode()) for text in held_out) / sum(len(tokenizer.encode(text)) for text in held_out)
    assert f"bytes per token on 2 held-out documents, 0.00 MB: {share:.3f}" in out
    assert "not compared with gpt2" in out
    vocabulary = tokenizer.backend.get_vocab()
    assert "common" in vocabulary
    assert not any("zeb" in token or "gir" in token for token in vocabulary)
    table = run("scripts/train_tokenizer.py", "--input", tmp_path / "part.parquet", *flags, "--max-documents", 250,
                "--output-dir", tmp_path / "b")  # fmt: skip
    succeed(table)
    assert load_tokenizer(str(tmp_path / "b")).sha256 == tokenizer.sha256


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        ([], "give either --input or --dataset"),
        (["--input", "README.md", "--dataset", "x"], "give either --input or --dataset"),
        (["--input", "README.md", "--vocab-size", "257", "--special-tokens", "<|a|>"], "at least 258"),
        (["--input", "README.md", "--special-tokens", "the"], "--special-tokens 'the'"),
        (["--input", "README.md", "--max-documents", "0"], "--max-documents 0"),
    ],
)
def test_a_wrong_tokenizer_training_is_one_line(flags: list[str], culprit: str, tmp_path: Path) -> None:
    result = run_here("scripts/train_tokenizer.py", *flags, "--output-dir", tmp_path / "out")
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert culprit in result.stderr
    assert not (tmp_path / "out").exists()


def test_no_tokenizer_is_trained_on_nothing(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    result = run_here("scripts/train_tokenizer.py", "--input", tmp_path, "--output-dir", tmp_path / "out")
    assert result.returncode == 2
    assert "--input: it holds no text" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "lines.txt").write_text("\n".join(DOCUMENTS))
    flags = ["--input", tmp_path / "lines.txt", "--split-by", "line", "--tokenizer", "bytes", "--shard-size", 999]
    succeed(run_here("scripts/prepare_text.py", *flags, "--test-fraction", 0.2, "--output-dir", tmp_path / "data"))
    return tmp_path / "data"


def test_an_inspection_counts_and_shows_both_splits(prepared: Path) -> None:
    text = succeed(run_here("scripts/inspect_data.py", prepared))
    for split in ("train", "test"):
        documents = split_documents(prepared / split)
        lengths = sorted(len(document.encode()) for document in documents)
        median, most = (lengths[int(np.ceil(share * len(lengths))) - 1] for share in (0.5, 0.9))
        assert (
            f"{len(documents)} documents counted, tokens in each: mean {np.mean(lengths):.1f}, median {median}, 90% at "
            f"most {most}, longest {lengths[-1]}"
        ) in text
        tokens = TokenStream(prepared / split).read(0, sum(lengths) + len(lengths))
        shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
        assert f"unigram entropy {-(shares * np.log(shares)).sum():.4f}" in text
        assert f"token 0: {documents[0]!r}" in text
        assert repr(documents[-1]) in text
    assert text.count("tokens that are not in the vocabulary: 0 (0.00%)") == 2
    assert text.count("ids and hashes of all shards") == 2


@pytest.mark.parametrize(
    ("damage", "found"), [("flip", "sha256"), ("id", "not in the vocabulary"), ("cut", "cut short")]
)
def test_an_inspection_names_the_damaged_shard(damage: str, found: str, prepared: Path) -> None:
    shard = sorted((prepared / "train").glob("*.npy"))[2]
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[-200] ^= 1
    elif damage == "id":
        data[-199] ^= 0x80  # the high byte of a uint16
    else:
        del data[-2:]
    shard.write_bytes(data)
    result = run_here("scripts/inspect_data.py", prepared / "train")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert str(shard) in result.stderr
    assert found in result.stderr
    if damage == "flip":
        succeed(run_here("scripts/inspect_data.py", prepared / "train", "--no-verify"))


def test_shards_made_elsewhere_are_inspected(tmp_path: Path) -> None:
    """llm.c's: end-of-text before each document, both splits in one folder."""
    for split, documents in (("train", [b"one", b"three"]), ("val", [b"seven"])):
        tokens = [token for document in documents for token in (256, *document)]
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, len(tokens)
        (tmp_path / f"x_{split}_000.bin").write_bytes(header.tobytes() + np.array(tokens, np.uint16).tobytes())
    text = succeed(run_here("scripts/inspect_data.py", tmp_path, "--tokenizer", "bytes"))
    assert "2 documents counted, tokens in each: mean 4.0, median 3, 90% at most 5, longest 5" in text
    assert "token 0: 'one'" in text
    assert "'three'" in text
    assert "'seven'" in text
    plain = succeed(run_here("scripts/inspect_data.py", tmp_path))
    assert "7 different ids, the largest 256" in plain
    assert "token 0: 256 111 110 101 256" in plain


def test_documents_longer_than_a_chunk_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_CHUNK", 7)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 100)
    tokens = np.concatenate([[*rng.integers(0, 9, length), 9] for length in lengths]).astype(np.uint16)
    for number, part in enumerate(np.array_split(tokens, 4)):
        np.save(tmp_path / f"{number}.npy", part)
    stream = TokenStream(tmp_path)
    found = inspection.contents(stream, 10, 9)
    assert found.lengths == Counter(lengths.tolist())
    assert found.tokens.tolist() == np.bincount(tokens).tolist()
    for share in (0.1, 0.5, 0.9, 1.0):
        assert found.length_quantile(share) == np.quantile(lengths, share, method="inverted_cdf")
    starts = [0, *(np.flatnonzero(tokens == 9) + 1)]
    for start, ids in inspection.sample(stream, 9, 5, 300):
        assert ids == tokens[start : start + lengths[starts.index(start)]].tolist()


def test_a_data_set_in_parquet_is_streamed(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "hub").mkdir()
    parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / "hub" / "part.parquet")
    flags = [
        "--dataset",
        tmp_path / "hub",
        "--tokenizer",
        "bytes",
        "--test-fraction",
        0.2,
        "--output-dir",
        tmp_path / "out",
    ]
    succeed(run("scripts/prepare_fineweb.py", *flags))
    assert sorted(split_documents(tmp_path / "out" / "train") + split_documents(tmp_path / "out" / "test")) == sorted(
        DOCUMENTS
    )


def test_an_endless_or_empty_preparation_is_refused(tmp_path: Path) -> None:
    result = run_here("scripts/prepare_fineweb.py", "--dataset", tmp_path, "--tokenizer", "bytes", "--shard-size", 0)
    assert result.returncode == 2
    assert "--shard-size 0" in result.stderr


def test_an_output_that_cannot_be_is_one_line(texts: Path, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    common = ["--input", texts, "--output-dir"]
    for program, *arguments in (
        ("scripts/prepare_text.py", "--tokenizer", "bytes", *common, file / "below"),
        ("scripts/train_tokenizer.py", "--vocab-size", 300, *common, file),
        ("scripts/plot_loss.py", trained, "--output", file / "x.png"),
    ):
        result = run_here(program, *arguments)
        assert result.returncode == 2, result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert str(file) in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        "prepare_text.py --input README.md LICENSE --output-dir",
        "prepare_fineweb.py --input README.md LICENSE --output-dir",
        "prepare_dataset.py --dataset tests --output-dir",
        "train_tokenizer.py --input README.md --output-dir",
        "prepare_text.py --output-dir x --tokenizer bytes --input",
        "prepare_dataset.py --tokenizer bytes --output-dir x --dataset",
        "prepare_chat.py --input README.md --output-dir",
        "prepare_sketches.py --input README.md --output-dir",
        "prepare_chat.py --tokenizer bytes --output-dir x --chat-template alpaca --input",
        "prepare_chat.py --tokenizer bytes --output-dir x --chat-template alpaca --dataset",
        "inspect_data.py",
    ],
)
def test_an_empty_name_is_not_the_folder_one_is_in(command: str, tmp_path: Path) -> None:
    program, *flags = command.split()
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / program, *flags, ""],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert f"{flags[-1] if flags else 'DIR'} is empty; " in line
    assert not list(tmp_path.iterdir())


def test_unigram_entropy_equals_its_definition(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.array([0, 0, 0, 0, 5, 5, 7, 9], dtype=np.uint16))
    shares = np.array([4, 2, 1, 1]) / 8
    entropy = contents(TokenStream(tmp_path), vocab_size=None, eot_id=None).unigram_entropy
    assert entropy == pytest.approx(-(shares * np.log(shares)).sum())


def test_losses_are_drawn(trained: Path, tmp_path: Path) -> None:
    picture = tmp_path / "loss.png"
    succeed(run_here("scripts/plot_loss.py", trained, "--more", "--log-x", "--output", picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(training_losses(trained)) == 20
    for flags in (
        [tmp_path],
        [trained, "--output", tmp_path / "x.jpg"],
        [trained, "--output", tmp_path / "none" / "x.png"],
    ):
        result = run_here("scripts/plot_loss.py", *flags)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)


def test_metrics_keep_full_precision(trained: Path) -> None:
    for loss in training_losses(trained):
        assert float(np.float32(loss)) == pytest.approx(loss, rel=1e-15)
    assert all(json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines())
