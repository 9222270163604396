"""Preparing data: the same bytes from every format, for any number of workers, and however often it is killed."""

import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from conftest import ROOT, run, succeed
from data.documents import documents, hashes

from gpt2xla.data.documents import corpus
from gpt2xla.data.documents.corpus import Position, blocks, documents_of, local_parts
from gpt2xla.data.preparation import splitting
from gpt2xla.data.preparation.chance import uniform
from gpt2xla.data.preparation.encoder import Encoder
from gpt2xla.data.preparation.pipeline import PrepareConfig, prepare
from gpt2xla.data.preparation.tokenizer_quality import first_loss
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.tokenizer import load_tokenizer, train_bpe


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(documents(300, seed=9), "small", 400, 2).save(folder)
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 documents in three files, with empty ones and nulls among them."""
    folder = tmp_path_factory.mktemp("parquet")
    texts: list[str | None] = [*documents(5000)]
    texts[7] = texts[4321] = None
    texts[11] = ""
    for number, part in enumerate(np.array_split(np.array(texts, dtype=object), 3)):
        table = pa.table({"id": range(len(part)), "text": pa.array(part.tolist(), pa.string())})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=600)
    return folder


def ids_of(folder: Path) -> list[int]:
    stream = TokenStream(folder)
    return stream.read(0, stream.length).tolist()


def test_shards_hold_what_the_tokenizer_says_document_by_document(
    parquet: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    flags = ["--input", parquet, "--tokenizer", tokenizer_folder, "--output-dir", tmp_path, "--shard-size", 77_777]
    succeed(run("scripts/prepare_fineweb.py", *flags, "--test-fraction", 0.03))
    tokenizer = load_tokenizer(str(tokenizer_folder))
    texts = [text for text in pq.read_table(parquet)["text"].to_pylist() if text]
    expected: dict[str, list[int]] = {"train": [], "test": []}
    for text, number in zip(texts, uniform(1061109567, 0, len(texts)), strict=True):
        expected["test" if number < 0.03 else "train"] += [*tokenizer.encode(text), tokenizer.eot_id]
    for split, ids in expected.items():
        assert ids_of(tmp_path / split) == ids
        manifest = TokenStream(tmp_path / split).manifest
        assert manifest is not None
        assert [shard.tokens for shard in manifest.shards[:-1]] == [77_777] * (len(manifest.shards) - 1)
    assert len(expected["test"]) == pytest.approx(0.03 * len(expected["train"]), rel=0.3)


def test_every_format_gives_the_same_shards(tokenizer_folder: Path, tmp_path: Path) -> None:
    import datasets

    texts = [text.replace("\n", " ") for text in documents(3000, seed=1)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    lines = "".join(json.dumps({"n": n, "text": text, "more": [n]}) + "\n" for n, text in enumerate(texts))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        stream.write(lines.encode())
    (tmp_path / "a.txt").write_text("\n".join(texts))
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts})}).save_to_disk(tmp_path / "dict")
    tokenizer, results = load_tokenizer(str(tokenizer_folder)), {}
    for name in ("a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "saved", "dict"):
        output = tmp_path / "out" / name
        parts = local_parts([tmp_path / name], split_by="line")
        prepare(parts, tokenizer, PrepareConfig(output_dir=str(output)), say=lambda _: None)
        results[name] = {file: hash_ for file, hash_ in hashes(output).items() if file != "preparation.json"}
    assert len(results["a.txt"]) == 8, "two splits of a shard, a manifest and two files of the tokenizer"
    assert all(result == results["a.txt"] for result in results.values())


@pytest.mark.parametrize(
    ("split_by", "expected"), [("file", ["a\nb\n\nc\n\n\n"]), ("line", ["a", "b", "c"]), ("blank-lines", ["a\nb", "c"])]
)
def test_text_is_cut_into_documents_as_asked(split_by: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\nb\n\nc\n\n\n")
    assert list(documents_of(local_parts([tmp_path], split_by=split_by))) == expected


def test_reading_resumes_anywhere(parquet: Path) -> None:
    parts = local_parts([parquet])
    everything = list(documents_of(parts))
    counts = [sum(len(b.texts) for b in blocks([part], Position(0, 0))) for part in parts]
    for start in (Position(0, 0), Position(0, 1), Position(1, 700), Position(2, counts[2]), Position(3, 0)):
        rest = [text for block in blocks(parts, start) for text in block.texts.to_pylist()]
        assert rest == everything[sum(counts[: start.part]) + start.documents :]


def prepare_command(parquet: Path, tokenizer: Path, output: Path, workers: int) -> list[str]:
    flags = ["--input", parquet, "--tokenizer", tokenizer, "--output-dir", output, "--num-workers", workers]
    return ["scripts/prepare_fineweb.py", *map(str, flags), "--shard-size", "50000"]


def test_workers_change_nothing(parquet: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 5):
        succeed(run(*prepare_command(parquet, tokenizer_folder, tmp_path / str(workers), workers)))
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2") == hashes(tmp_path / "5")


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    kills: int, parquet: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Slowed down, and with a record after every block, so that there are many moments to be killed at."""
    succeed(run(*prepare_command(parquet, tokenizer_folder, tmp_path / "unbroken", 2)))
    output = tmp_path / "broken"
    worker = [sys.executable, "tests/workers/slow_prepare_worker.py"]
    command = worker + prepare_command(parquet, tokenizer_folder, output, 2)[1:]
    rng = random.Random(kills)
    killed = went_on = 0
    while killed < kills:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        text, awaited = "", "recorded" if killed % 2 else "started"
        while (line := process.stdout.readline()) and awaited not in line:
            text += line
        time.sleep(rng.uniform(0, 0.8))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:  # it was done before
            assert hashes(output) == hashes(tmp_path / "unbroken")
            subprocess.run(["rm", "-r", output], check=True)
            continue
        killed += 1
        went_on += "resuming after" in text
    succeed(run(*prepare_command(parquet, tokenizer_folder, output, 3)))
    assert hashes(output) == hashes(tmp_path / "unbroken")
    assert went_on >= kills // 3


def test_a_limit_ends_with_the_document_that_reaches_it(parquet: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    config = PrepareConfig(output_dir=str(tmp_path), max_tokens=100_000, test_fraction=0.05, test_tokens=2000)
    manifests = prepare(local_parts([parquet]), load_tokenizer(str(tokenizer_folder)), config)
    tokens, most = sum(m.tokens for m in manifests.values()), 5 * 200
    assert 100_000 <= tokens < 100_000 + most
    assert 2000 - most < manifests["test"].tokens <= 2000


@pytest.mark.parametrize("flags", [{}, {"test_tokens": 3, "test_fraction": 0.5}, {"max_tokens": 300}], ids=str)
def test_test_gets_the_last_document_where_none_was_drawn(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_BLOCK_BYTES", 100)  # several blocks
    texts = [f"document {i} has so many words that there are a few blocks" for i in range(12)]
    (tmp_path / "a.txt").write_text("\n".join([*texts, "", "  "]))
    config, said = PrepareConfig(output_dir=str(tmp_path / "out"), **{"test_fraction": 0.001} | flags), []
    prepare(local_parts([tmp_path / "a.txt"], split_by="line"), load_tokenizer("bytes"), config, said.append)
    ids = [[*text.encode(), 256] for text in texts]
    if "max_tokens" in flags:
        ids = ids[: int(np.searchsorted(np.cumsum([len(one) for one in ids]), 300)) + 1]
    assert ids_of(tmp_path / "out" / "train") == list(itertools.chain(*ids[:-1]))
    assert ids_of(tmp_path / "out" / "test") == ids[-1]
    assert said == [
        f"note: none of {len(ids)} documents was drawn for test/ within --test-tokens; the last goes there",
        f"warning: test/ has only {len(ids[-1])} tokens, so validation losses will be noisy, by "
        f"±{3 / len(ids[-1]) ** 0.5:.2f} or more; leave --test-fraction out",
    ]


@pytest.mark.parametrize(
    ("flags", "least", "most", "says"),
    [
        ({}, 20_000, 22_000, "the end of the text was added"),  # of the long document, which is drawn, only a part
        ({"test_tokens": 100}, 80, 100, "allow more than 100"),
        ({"test_fraction": 0.01}, 379_998, 379_998, ""),
    ],
    ids=str,
)
def test_test_takes_no_more_than_it_needs_or_may(
    flags: dict[str, Any], least: int, most: int, says: str, tmp_path: Path
) -> None:
    texts = ["word " * 66] * 17 + ["words " * 63_333] + ["word " * 66] * 4
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    config, said = PrepareConfig(output_dir=str(tmp_path / "out"), **flags), [""]
    manifests = prepare(
        local_parts([tmp_path / "a.txt"], split_by="endoftext"), load_tokenizer("bytes"), config, said.append
    )
    assert least <= manifests["test"].tokens <= most
    assert says in said[-1]


@pytest.mark.parametrize(
    ("documents", "drawn", "tokens", "moved"),
    [
        ([300_000], 0, 20_000, "a part of a document"),
        ([2_900] * 40 + [60_000] * 4, 2_900, 20_000, "a part of a document"),
        ([900] * 400, 4_500, 20_000, "18 documents"),
        ([60_000] * 3 + [4_000] * 30, 4_000, 20_000, "4 documents"),
        ([500] * 80, 500, 4_000, "7 documents"),
        ([150_000] * 15, 0, 22_500, "a part of a document"),
        ([90], 0, 9, "a part of a document"),
    ],
    ids=["one", "long end", "short", "long beginning", "tiny", "one percent", "a line"],
)
def test_the_end_of_the_text_tops_test_up(
    documents: list[int], drawn: int, tokens: int, moved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes with the end-of-text id, in a byte tokenizer's tokens. Nothing is lost, nothing is in both splits, and where
    blocks end changes nothing."""
    text, start = "".join(f"{number:08}\n" for number in range(sum(documents) // 9 + 1)), 0
    with (tmp_path / "a.txt").open("w") as file:
        for size in documents:
            file.write("x" + text[start : start + size - 3] + "x<|endoftext|>")  # without spaces around it
            start += size - 1
    found = {}
    for block in (4_000_000, 5_000):
        monkeypatch.setattr(corpus, "_BLOCK_BYTES", block)
        monkeypatch.setattr(corpus, "_ARRAY_CHARACTERS", block // 4)
        said: list[str] = []
        config = PrepareConfig(output_dir=str(tmp_path / str(block)), num_workers=1)
        prepare(local_parts([tmp_path / "a.txt"], split_by="endoftext"), load_tokenizer("bytes"), config, said.append)
        found[block] = hashes(tmp_path / str(block))
    assert found[4_000_000] == found[5_000]
    train, test = (np.array(ids_of(tmp_path / "5000" / split)) for split in ("train", "test"))
    assert tokens <= len(test) <= 1.5 * tokens + 1000
    assert f"for test/ had {drawn:,} tokens, so the end of the text was added: {moved}" in said[0]
    assert (len(said) == 2) == (len(test) < 20_000)
    lines = [bytes(ids[ids < 256].astype(np.uint8)).split(b"\n") for ids in (train, test)]
    assert not set(filter(lambda line: len(line) == 8, lines[0])) & set(filter(lambda line: len(line) == 8, lines[1]))
    cut = "part" in moved
    assert (train == 256).sum() + (test == 256).sum() == len(documents) + cut
    assert len(train) + len(test) == sum(documents) + cut


def test_what_is_large_enough_stays_as_it_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The minimum of a large corpus is not its hundredth, which a draw misses by a little, but an ample number."""
    monkeypatch.setattr(splitting, "USEFUL_TOKENS", 5)
    monkeypatch.setattr(splitting, "_AMPLE_TOKENS", 5)
    (tmp_path / "a.txt").write_text("\n".join(f"line {number}" for number in range(200)))
    parts, found = local_parts([tmp_path / "a.txt"], split_by="line"), []
    for fraction in (None, 0.01):
        config = PrepareConfig(output_dir=str(tmp_path / str(fraction)), test_fraction=fraction)
        manifests = prepare(parts, load_tokenizer("bytes"), config)
        assert 5 <= manifests["test"].tokens < 0.01 * manifests["train"].tokens
        found.append([ids_of(tmp_path / str(fraction) / split) for split in ("train", "test")])
    assert found[0] == found[1]


def test_a_record_of_an_older_version_is_still_known(finished: tuple[list[str], Path, Path]) -> None:
    """It says 0.01 where --test-fraction was left out."""
    command, _, output = finished
    without = [word for word in command if word not in ("--test-fraction", "0.3")]
    result = run(*without)
    assert "with --test-fraction 0.3, now left to the default" in result.stderr
    record = output / "preparation.json"
    record.write_text(record.read_text().replace('"test_fraction": 0.3', '"test_fraction": 0.01'))
    assert "nothing to do" in succeed(run(*without))


def test_a_tokenizer_that_loses_text_is_reported(tmp_path: Path) -> None:
    """A word-level one that knows two words, and lower case alone."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "known": 1, "word": 2}, unk_token="?"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    lossy, whole = load_tokenizer(str(tmp_path / "tokenizer.json")), load_tokenizer("bytes")
    texts = ["known word", "  word ", "known Word", "new word"]
    assert first_loss(lossy, texts[:2]) is None
    assert first_loss(lossy, texts) == ("known Word", "known word")
    assert first_loss(lossy, texts[3:]) == ("new word", "? word")
    assert first_loss(whole, [*texts, "naïve\r\n\x01🙂 <|endoftext|>"]) is None
    (tmp_path / "a.txt").write_text("\n".join(texts))
    said: list[str] = []
    config = PrepareConfig(output_dir=str(tmp_path / "out"))
    prepare(local_parts([tmp_path / "a.txt"], split_by="line"), lossy, config, said.append)
    warnings = [line for line in said if line.startswith("warning: tokenizer")]
    assert warnings == [f"warning: tokenizer {lossy.name} loses text: 'known Word' comes back as 'known word'"]


@pytest.mark.parametrize("kind", ["trained", "bytes", "gpt2"])
def test_the_fast_encoder_equals_the_tokenizer(
    kind: str, tokenizer_folder: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("gigatoken", reason="needs gigatoken: pip install -e '.[fast]'")
    name = str(tokenizer_folder) if kind == "trained" else kind
    if kind == "gpt2":
        request.getfixturevalue("gpt2_encoding")
    tokenizer = load_tokenizer(name)
    texts = [*documents(400, seed=4), (ROOT / "README.md").read_text(), "a", " ", "\n\n\n", " " * 1000, "\u2028\x00é́"]
    encoder = Encoder(tokenizer)
    assert encoder.fast == (kind != "bytes"), "it takes no vocabulary without merges"
    array = pa.array(["left out", *texts], pa.large_string())[1:]
    encoded = encoder(array)
    expected = [[*tokenizer.encode(text), tokenizer.eot_id] for text in texts]
    assert encoded.ids.tolist() == list(itertools.chain(*expected))
    assert encoded.ends.tolist() == np.cumsum([len(ids) for ids in expected]).tolist()
    assert encoded.sizes.tolist() == [len(text.encode()) for text in texts]


@pytest.mark.parametrize("harm", [lambda ids, ends: (ids[::-1], ends), lambda ids, ends: 1 / 0], ids=["ids", "error"])
def test_an_encoder_that_differs_is_not_used(tokenizer_folder: Path, harm: Callable[..., Any]) -> None:
    """As a release of gigatoken that this one was not tried with might."""
    encoder = Encoder(load_tokenizer(str(tokenizer_folder)))
    right = encoder._reference
    encoder._encode = lambda texts: harm(*right(texts))
    encoder.fast = True
    texts = pa.array(documents(20), pa.large_string())
    assert not encoder.check(texts)
    assert not encoder.fast
    assert encoder(texts).ids.tolist() == Encoder(load_tokenizer(str(tokenizer_folder)))(texts).ids.tolist()


def test_ids_past_16_bits_are_stored_in_32(tmp_path: Path) -> None:
    vocabulary = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 70_000}, "unk_token": "a"}, "version": "1.0"}
    pieces = {"pre_tokenizer": {"type": "Whitespace"}, "added_tokens": [], "normalizer": None, "post_processor": None}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(vocabulary | pieces | {"decoder": None, "truncation": None, "padding": None}))
    (tmp_path / "text.txt").write_text("a b b\nb a a\n" * 50)
    config = PrepareConfig(output_dir=str(tmp_path / "out"), test_fraction=0.3)
    manifests = prepare(local_parts([tmp_path / "text.txt"], split_by="line"), load_tokenizer(str(file)), config)
    assert manifests["train"].dtype == "uint32"
    assert set(ids_of(tmp_path / "out" / "train")) == {0, 70_000}


def test_resuming_with_another_corpus_is_refused(parquet: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", parquet, data], check=True)
    command = prepare_command(data, tokenizer_folder, tmp_path / "out", 1)
    worker = subprocess.run(
        [sys.executable, "tests/workers/slow_prepare_worker.py", *command[1:]],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "STOP_AFTER_BLOCKS": "2"}, check=False, capture_output=True,
    )  # fmt: skip
    assert worker.returncode == -signal.SIGKILL
    pq.write_table(pa.table({"text": ["another"]}), data / "0.parquet")
    result = run(*command)
    assert result.returncode == 2
    assert "0.parquet of" in result.stderr
    assert "give the same input" in result.stderr


def test_a_full_disk_keeps_what_is_there(parquet: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files is the nearest that a user without privileges can come to a full disk."""
    command = prepare_command(parquet, tokenizer_folder, tmp_path / "out", 1)
    worker = [sys.executable, "tests/workers/slow_prepare_worker.py", *command[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FULL_AFTER_BLOCKS": "3"}
    full = subprocess.run(worker, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert full.returncode == 1
    assert "no space left on the disk; free some and give the same command again" in full.stderr
    assert "Traceback" not in full.stderr
    succeed(run(*command))
    succeed(run(*prepare_command(parquet, tokenizer_folder, tmp_path / "unbroken", 1)))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "unbroken")


@pytest.fixture
def finished(tmp_path: Path) -> tuple[list[str], Path, Path]:
    """A preparation that is done: its command, the input folder and the output."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("\n\n".join(documents(60)))
    command = ["scripts/prepare_text.py", "--input", texts, "--output-dir", tmp_path / "out", "--tokenizer", "bytes"]
    command = [*map(str, command), "--test-fraction", "0.3", "--split-by", "blank-lines"]
    succeed(run(*command))
    return command, texts, tmp_path / "out"


@pytest.mark.parametrize("change", ["split by", "new file", "no shard", "no split"])
def test_what_is_prepared_is_only_called_so_if_it_is(change: str, finished: tuple[list[str], Path, Path]) -> None:
    command, texts, output = finished
    assert "nothing to do" in succeed(run(*command))
    if change == "split by":
        command = [*command, "--split-by", "line"]
    elif change == "new file":
        (texts / "b.txt").write_text("another")
    elif change == "no shard":
        (output / "test" / "shard_000000.npy").unlink()
    else:
        subprocess.run(["rm", "-r", output / "train"], check=True)
    result = run(*command)
    assert result.returncode == 2, result.stdout + result.stderr
    assert len(result.stderr.splitlines()) == 1
    says = {"split by": "split by blank-lines, but now there is", "new file": "from nothing, but now there is"}
    assert says.get(change, "to prepare it again, remove what is left") in result.stderr


def test_two_at_once_are_refused(parquet: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    command = prepare_command(parquet, tokenizer_folder, tmp_path / "out", 1)
    worker = [sys.executable, "tests/workers/slow_prepare_worker.py", *command[1:]]
    with subprocess.Popen(
        worker, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert "started" in first.stdout.readline()
        second = run(*command)
        assert second.returncode == 2
        assert "in use by process" in second.stderr
        first.communicate()
    assert first.returncode == 0
    succeed(run(*prepare_command(parquet, tokenizer_folder, tmp_path / "alone", 1)))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
