"""The data scripts: what they write, against the text they were given."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import run, succeed, training_losses

from gpt2xla.data.shards import Manifest, TokenStream, file_sha256
from gpt2xla.evals.unigram import unigram_entropy
from gpt2xla.tokenizer import load_tokenizer

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

    succeed(run("scripts/prepare_text.py", *arguments, "--output-dir", tmp_path / "b"))
    assert Manifest.load(tmp_path / "b" / "train") == manifest, "the same input gives the same shards"
    again = ["scripts/prepare_text.py", *arguments, "--output-dir", tmp_path / "b"]
    assert "nothing to do" in succeed(run(*again))
    other = run(*again, "--seed", 5)
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
        (["--input", "README.md"], "split came out empty"),
        ([], "--input"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(flags: list[str], culprit: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("scripts/prepare_text.py", "--tokenizer", "bytes", *flags, "--output-dir", output)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert culprit in result.stderr
    assert not output.exists()


def test_a_tokenizer_is_trained_and_found_beside_the_shards(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    arguments = ["--input", texts, "--output-dir", folder, "--vocab-size", 300]
    assert "297 ids (fewer than asked: the text has no more pairs" in succeed(
        run("scripts/train_tokenizer.py", *arguments)
    )
    assert run("scripts/train_tokenizer.py", *arguments).returncode == 2
    flags = ["--input", texts, "--tokenizer", folder, "--test-fraction", 0.2, "--output-dir", tmp_path / "data"]
    succeed(run("scripts/prepare_text.py", *flags))
    text = succeed(run("scripts/inspect_data.py", tmp_path / "data" / "train"))
    assert "tokenizer tokenizer, 297 ids, end of text 296" in text
    assert "Document " in text


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
    result = run("scripts/prepare_fineweb.py", "--dataset", tmp_path, "--tokenizer", "bytes", "--shard-size", 0)
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
        result = run(program, *arguments)
        assert result.returncode == 2, result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert str(file) in result.stderr


def test_unigram_entropy_equals_its_definition(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.array([0, 0, 0, 0, 5, 5, 7, 9], dtype=np.uint16))
    shares = np.array([4, 2, 1, 1]) / 8
    assert unigram_entropy(TokenStream(tmp_path)) == pytest.approx(-(shares * np.log(shares)).sum())


def test_losses_are_drawn(trained: Path, tmp_path: Path) -> None:
    picture = tmp_path / "loss.png"
    succeed(run("scripts/plot_loss.py", trained, trained / "metrics.jsonl", "--output", picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(training_losses(trained)) == 20
    assert run("scripts/plot_loss.py", tmp_path).returncode == 2


def test_metrics_keep_full_precision(trained: Path) -> None:
    for loss in training_losses(trained):
        assert float(np.float32(loss)) == pytest.approx(loss, rel=1e-15)
    assert all(json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines())
