"""`prepare_sketches.py`: what the rows hold, against drawings read plainly; that nothing but drawings and options decides on
it; and its reports."""

from __future__ import annotations

import bz2
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from conftest import ROOT, run_here, succeed
from test_strokes import QUICKDRAW

from gpt2xla.data.documents.corpus import local_parts
from gpt2xla.data.preparation.options import PrepareConfig
from gpt2xla.data.preparation.pipeline import prepare as prepare_text
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.files import file_sha256
from gpt2xla.sketches import buckets, sources
from gpt2xla.sketches.buckets import Buckets
from gpt2xla.sketches.format import SketchFormat
from gpt2xla.sketches.strokes import rasterise

ALONE = ["--num-workers", 1, "--test-fraction", 0.25]
FILES = [QUICKDRAW / "raw.ndjson", QUICKDRAW / "simplified.ndjson"]
Found = Counter[tuple[str, bytes]]


def prepare(*flags: object, folder: Path) -> list[str]:
    """Return the lines that it prints."""
    return succeed(run_here("scripts/prepare_sketches.py", *ALONE, "--output-dir", folder, *flags)).splitlines()


def refusal(*flags: object, folder: Path) -> str:
    result = run_here("scripts/prepare_sketches.py", *ALONE, "--output-dir", folder / "out", *flags)
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert not (folder / "out").exists()
    return line.removeprefix("prepare_sketches.py: error: ")


def records(files: list[Path] = FILES) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def pictures(values: list[dict[str, Any]], size: int = 24, width: int = 1) -> Found:
    """Word and picture of each record."""
    strokes = [[np.array(stroke[:2], dtype=float).T for stroke in value["drawing"]] for value in values]
    return Counter((v["word"], rasterise(s, size, width).tobytes()) for v, s in zip(values, strokes, strict=True))


def rows(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a split, and their masks."""
    stream = TokenStream(folder)
    assert stream.manifest is not None
    length = stream.manifest.row_length
    assert length is not None
    assert stream.length % length == 1
    ids, trained = stream.read(0, stream.length), stream.trained(0, stream.length)
    assert not trained[-1]
    assert trained.sum() == stream.manifest.trained_tokens
    return ids[:-1].reshape(-1, length), trained[:-1].reshape(-1, length)


def sketches(folder: Path) -> list[tuple[str, list[int]]]:
    """The text of each sketch in a split, none of which crosses the border of a row, and which of its ids are trained on."""
    tokenizer = load_tokenizer(str(folder))
    found = []
    for row, mask in zip(*rows(folder), strict=True):
        starts = [*np.flatnonzero(row == tokenizer.eot_id).tolist(), len(row)]
        assert starts[0] == 0
        for start, end in itertools.pairwise(starts):
            text = tokenizer.decode(row[start:end].tolist()).removeprefix("<|endoftext|>")
            if text:
                assert text.startswith("<MSGSTART>")
                assert text.endswith("<MSGEND>")
                assert text.count("<MSG") == text.count("<IMG") == 2
                found.append((text, np.flatnonzero(mask[start:end]).tolist()))
            else:  # or else it fills the row
                assert not mask[start:end].any()
    return found


def held(folder: Path, *splits: str) -> Found:
    """Word and picture of each sketch, as the format reads them."""
    found: Found = Counter()
    for split in splits or ("train", "test"):
        format = SketchFormat.of(load_tokenizer(str(folder / split)))
        assert format is not None
        for row in rows(folder / split)[0]:
            found.update((word, picture.tobytes()) for picture, word in format.sketches(row))
    return found


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): file_sha256(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "preparation.json"  # which names the files that were read
    }


def test_every_drawing_stands_once_and_whole_in_a_row(tmp_path: Path) -> None:
    said = prepare("--input", QUICKDRAW, "--seq-length", 200, folder=tmp_path / "out")
    expected = pictures(records())
    assert held(tmp_path / "out") == expected
    test = held(tmp_path / "out", "test")
    assert 0 < test.total() < expected.total() / 2
    texts = sketches(tmp_path / "out" / "train") + sketches(tmp_path / "out" / "test")
    assert len(texts) == 38
    shown = succeed(run_here("scripts/inspect_data.py", tmp_path / "out" / "train"))
    assert f"\n{len(sketches(tmp_path / 'out' / 'train'))} drawings\n" in shown
    for text, trained in texts:
        # With the word before, the picture and what follows it is the answer; otherwise the word, and the end.
        assert trained in ([*range(4, 79)], [76, 77])
        word = text.partition("<IMGEND>")[2].removesuffix("<MSGEND>")
        assert text.startswith((f"<MSGSTART>{word}<IMGSTART>", "<MSGSTART><IMGSTART>"))
    before = sum(not text.startswith("<MSGSTART><IMGSTART>") for text, _ in texts)
    assert 10 <= before <= 28  # of 38 with probability a half
    assert said[:3] == [
        "left out: 1 of other kinds (.md)",
        "tokenizer: 534 ids, 72 tokens for each picture; 12 of 12 words are one token",
        "38 drawings read, 38 kept",
    ]
    for line, split in zip(said[3:], ("train", "test"), strict=True):
        manifest = TokenStream(tmp_path / "out" / split).manifest
        assert manifest is not None
        number = manifest.documents
        assert line.startswith(f"{tmp_path / 'out' / split}: {manifest.tokens // 200} rows of 200 tokens, ")
        assert f"with {number} drawings in {number} sketches; {manifest.trained_tokens:,} tokens trained on" in line
    assert prepare("--input", QUICKDRAW, "--seq-length", 200, folder=tmp_path / "out")[1:] == [
        f"{tmp_path / 'out'} is prepared already: nothing to do"
    ]


def test_the_text_through_the_tokenizer_is_the_same_ids(tmp_path: Path) -> None:
    """Also by prepare_text.py, for which a blank line is a border."""
    prepare("--input", QUICKDRAW, folder=tmp_path / "ids")
    prepare("--input", QUICKDRAW, "--as-text", folder=tmp_path / "text")
    assert prepare("--input", QUICKDRAW, "--as-text", folder=tmp_path / "text")[-1].endswith("nothing to do")
    for split in ("train", "test"):
        file = tmp_path / "text" / split / "sketches.txt"
        texts = file.read_text().split("\n\n")
        assert texts.pop() == ""
        tokenizer = load_tokenizer(str(file.parent))
        assert tokenizer.eot_id is not None
        found = sorted(tokenizer.reading_special_tokens().encode(text) for text in texts)
        assert found == documents(rows(tmp_path / "ids" / split)[0].ravel(), tokenizer.eot_id)
        stated = TokenStream(tmp_path / "ids" / split).manifest
        assert stated is not None
        assert stated.bytes == sum(len(text.encode()) for text in texts)
    config = PrepareConfig(output_dir=str(tmp_path / "stream"), special_tokens_in_text="as-ids", test_fraction=0.5)
    prepare_text(local_parts([file], split_by="blank-lines"), tokenizer, config, lambda line: None)
    streams = [TokenStream(tmp_path / "stream" / split) for split in ("train", "test")]
    assert documents(np.concatenate([stream.read(0, stream.length) for stream in streams]), tokenizer.eot_id) == found


def documents(ids: np.ndarray, eot_id: int) -> list[list[int]]:
    """What stands between end-of-text tokens, sorted."""
    parts = np.split(ids, np.flatnonzero(ids == eot_id))
    return sorted([id for id in part.tolist() if id != eot_id] for part in parts if set(part.tolist()) - {eot_id})


def test_only_drawings_and_options_decide_on_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the order and number of the files, or how much memory holds. Workers: see below."""
    given = tmp_path / "given"
    given.mkdir()
    lines = [line for file in FILES for line in file.read_text().splitlines()]
    (given / "a.ndjson.bz2").write_bytes(bz2.compress(("\n".join(lines[30:]) + "\n").encode()))
    (given / "b.jsonl").write_text("\n\n".join(lines[29::-1]))
    flags = ["--augment", 2, "--seq-length", 256, "--shard-size", 1000]
    prepare("--input", *FILES, *flags, folder=tmp_path / "one")
    expected = hashes(tmp_path / "one")
    assert sum("train/shard" in name for name in expected) > 4
    monkeypatch.setattr(buckets, "_HELD_BYTES", 2000)
    prepare("--input", given, *flags, folder=tmp_path / "two")
    assert hashes(tmp_path / "two") == expected


def test_a_drawing_that_is_there_twice_stands_once(tmp_path: Path) -> None:
    again = tmp_path / "again.ndjson"
    again.write_text("".join(FILES[1].read_text().splitlines(keepends=True)[3:7]))
    said = prepare("--input", *FILES, again, folder=tmp_path / "out")
    assert said[-3] == "42 drawings read, 38 kept; left out: 4 there twice"
    assert held(tmp_path / "out") == pictures(records())


def test_the_order_of_files_does_not_choose_among_drawings_of_one_key(tmp_path: Path) -> None:
    """Such as the raw and the simplified form of one, or one under two words."""
    other = tmp_path / "other.ndjson"
    mirrored = [
        value | {"word": ["sun", value["word"]][n % 2], "drawing": [[y, x] for x, y, *_ in value["drawing"]]}
        for n, value in enumerate(records(FILES[:1]))
    ]
    other.write_text("".join(json.dumps(value) + "\n" for value in mirrored))
    for name, files in (("one", [FILES[0], other]), ("two", [other, FILES[0]])):
        said = prepare("--input", *files, "--augment", 1, folder=tmp_path / name)
        count = len(mirrored)
        assert said[-3] == f"{2 * count} drawings read, {count} kept; left out: {count} there twice"
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_neither_files_nor_workers_decide_on_the_ids_of_words(tmp_path: Path) -> None:
    """Of --per-word, how many drawings are read of a word before it has enough depends on both."""
    strokes = [[[0, 200, 100], [0, 50, 255]]]
    for file, counts in (("a", (60, 12)), ("b", (12, 60))):
        values = [
            {"word": word, "key_id": f"{file}{word}{n}", "drawing": strokes}
            for word, count in zip(("apple", "sun"), counts, strict=True)
            for n in range(count)
        ]
        (tmp_path / f"{file}.ndjson").write_text("".join(json.dumps(value) + "\n" for value in values))
    files = [tmp_path / "a.ndjson", tmp_path / "b.ndjson"]
    for name, given in (("one", files), ("two", files[::-1])):
        prepare("--input", *given, "--per-word", 12, folder=tmp_path / name)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_copies_of_a_drawing_are_other_pictures_in_train_only(tmp_path: Path) -> None:
    prepare("--input", *FILES, "--stroke-width", 2, folder=tmp_path / "plain")
    said = prepare("--input", *FILES, "--augment", 3, "--stroke-width", 2, folder=tmp_path / "more")
    assert held(tmp_path / "more", "test") == held(tmp_path / "plain", "test")
    plain, more = held(tmp_path / "plain", "train"), held(tmp_path / "more", "train")
    assert held(tmp_path / "plain") == pictures(records(), width=2)
    assert plain <= more
    assert more.total() == 4 * plain.total()
    assert set(more.values()) == {1}
    words = [Counter(word for word, _ in found.elements()) for found in (plain, more)]
    assert {word: 4 * number for word, number in words[0].items()} == words[1]
    assert f"with {plain.total()} drawings in {4 * plain.total()} sketches" in said[-2]


def test_held_out_drawings_stay_so_when_there_are_more(tmp_path: Path) -> None:
    prepare("--input", FILES[0], folder=tmp_path / "few")
    prepare("--input", *FILES, folder=tmp_path / "all")
    first = pictures(records(FILES[:1]))
    assert held(tmp_path / "all", "test") & first == held(tmp_path / "few", "test")
    prepare("--input", *FILES, "--seed", 1, folder=tmp_path / "other")
    assert held(tmp_path / "other", "test") != held(tmp_path / "all", "test")


def test_words_recognition_and_number_per_word_choose(tmp_path: Path) -> None:
    words = ["apple", "alarm clock", "bicycle", "sun"]
    chosen = [value for value in records() if value["word"] in words]
    said = prepare("--input", *FILES, "--words", *words, folder=tmp_path / "a")
    assert said[-3] == "38 drawings read, 14 kept; left out: 24 of other words"
    assert held(tmp_path / "a") == pictures(chosen)
    assert sorted(SketchFormat.of(load_tokenizer(str(tmp_path / "a" / "test"))).words) == sorted(words)  # type: ignore[union-attr]
    said = prepare("--input", *FILES, "--words", *words, "--recognized-only", folder=tmp_path / "b")
    assert said[-3] == "38 drawings read, 12 kept; left out: 24 of other words, 2 not recognized"
    assert held(tmp_path / "b") == pictures([value for value in chosen if value["recognized"]])
    said = prepare("--input", *FILES, "--per-word", 2, "--augment", 1, folder=tmp_path / "c")
    assert said[-3].startswith("38 drawings read, 24 kept; left out: 14 beyond --per-word")
    two = held(tmp_path / "c", "test") + (held(tmp_path / "c", "train") & pictures(records()))
    assert two <= pictures(records())
    assert set(Counter(word for word, _ in two.elements()).values()) == {2}
    prepare("--input", *reversed(FILES), "--per-word", 2, "--augment", 1, folder=tmp_path / "d")
    assert hashes(tmp_path / "d") == hashes(tmp_path / "c")


def test_which_words_are_tokens_does_not_depend_on_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where --per-word drops drawings while others are still being read."""
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 2000)
    drawings = [[json.dumps({"word": w, "drawing": [[[0, n + 1], [0, 9]]]}) for n in range(60)] for w in ("one", "two")]
    for name, (first, second) in {"a": drawings, "b": drawings[::-1]}.items():
        (tmp_path / f"{name}.ndjson").write_text("\n".join(first + second))  # of the first word, then of the other
        flags = ["--per-word", 9, "--vocab-size", 518]
        prepare("--input", tmp_path / f"{name}.ndjson", *flags, folder=tmp_path / name)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


@pytest.mark.parametrize("loss_on", ["word", "all"])
@pytest.mark.parametrize("share", [0, 1])
def test_the_word_before_and_what_is_trained_on(tmp_path: Path, share: int, loss_on: str) -> None:
    prepare("--input", *FILES, "--word-before", share, "--loss-on", loss_on, folder=tmp_path / "out")
    for text, trained in sketches(tmp_path / "out" / "train"):
        before, _, after = text.partition("<IMGSTART>")
        word = after.partition("<IMGEND>")[2].removesuffix("<MSGEND>")
        assert before == "<MSGSTART>" + word * share
        first = {"word": 76 + share, "all": 1}[loss_on]  # the word after is one token, and the end another
        assert trained == list(range(first, 78 + share))


@pytest.mark.parametrize("tokenizer", ["bytes", "trained"])
def test_any_tokenizer_writes_the_same_sketches(tmp_path: Path, tokenizer: str) -> None:
    """Also one that was trained along before; sketches that it makes too long for a row are left out."""
    if tokenizer == "trained":
        prepare("--input", *FILES, "--words", "apple", "sun", folder=tmp_path / "before")
        tokenizer = str(tmp_path / "before" / "train")
    common = ["--input", *FILES, "--tokenizer", tokenizer]
    said = prepare(*common, folder=tmp_path / "out")
    assert ("added to tokenizer bytes: <MSGSTART> = 257, " in said[0]) == (tokenizer == "bytes")
    assert held(tmp_path / "out") == pictures(records())
    if tokenizer == "bytes":
        lengths = [599 + 5 + len(value["word"].encode()) for value in records()]
        limit = sorted(lengths)[19]
        said = prepare(*common, "--seq-length", limit, "--word-before", 0, folder=tmp_path / "short")
        kept = [value for value, length in zip(records(), lengths, strict=True) if length <= limit]
        assert said[-3] == f"38 drawings read, {len(kept)} kept; left out: {38 - len(kept)} longer than {limit} tokens"
        assert held(tmp_path / "short") == pictures(kept)


def test_files_behind_urls_are_fetched_while_they_are_read(tmp_path: Path) -> None:
    storage = fsspec.filesystem("memory")
    for file in FILES:
        storage.pipe(f"/drawings/{file.name}", file.read_bytes())
    storage.pipe("/drawings/page.html", b"<html>")
    prepare("--input", *FILES, folder=tmp_path / "local")
    for number, names in enumerate(
        (["memory://drawings/*.ndjson"], ["memory://drawings"], ["memory://drawings/raw.ndjson", FILES[1]])
    ):
        prepare("--input", *names, folder=tmp_path / str(number))
        assert hashes(tmp_path / str(number)) == hashes(tmp_path / "local")
    assert prepare("--input", "memory://drawings", folder=tmp_path / "1")[-1].endswith(
        "prepared already: nothing to do"
    )
    storage.pipe("/drawings/raw.ndjson", FILES[0].read_bytes()[:-1])
    result = run_here(
        "scripts/prepare_sketches.py", *ALONE, "--output-dir", tmp_path / "1", "--input", "memory://drawings"
    )
    assert result.returncode == 2
    assert "was prepared from memory:///drawings/raw.ndjson of 67,856 bytes" in result.stderr
    assert refusal("--input", "memory://drawings/*.zip", folder=tmp_path) == (
        "--input memory://drawings/*.zip: no such file there; check the address"
    )
    twice = refusal("--input", "memory://drawings/raw.ndjson", "memory://drawings/r*", folder=tmp_path)
    assert twice == "--input names memory:///drawings/raw.ndjson twice; name it once"


def test_buckets_sort_what_memory_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_HELD_BYTES", 10_000)
    numbers = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64)
    records = np.empty(5000, dtype=[("order", "<u8"), ("place", "<u4")])
    records["order"], records["place"] = np.append(numbers[:-10], numbers[:10]), np.arange(5000)
    held = Buckets(tmp_path / "buckets")
    for part in np.array_split(records, 17):
        held.add(part)
    held.close()
    assert len(held.files) == 256
    found = np.concatenate([buckets.in_order(file, records.dtype) for file in held.files])
    assert np.array_equal(found, records[np.argsort(records["order"], kind="stable")])


@pytest.mark.slow
def test_a_killed_preparation_made_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """Killed at ten moments, with two workers, none of which outlives it; and the bytes are those of one worker."""
    given = tmp_path / "given.ndjson"
    with given.open("w") as stream:
        for number in range(300):
            for line in records():
                stream.write(json.dumps(line | {"key_id": f"{line['key_id']}-{number}"}) + "\n")
    flags = ["--input", given, "--augment", 1, "--num-workers", 2, "--test-fraction", 0.1, "--shard-size", 300_000]
    command = [sys.executable, "scripts/prepare_sketches.py", *map(str, flags), "--output-dir"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    subprocess.run([*command, tmp_path / "whole"], cwd=ROOT, env=environment, check=True, capture_output=True)
    seconds = time.monotonic() - began
    expected = hashes(tmp_path / "whole")
    subprocess.run([*command, tmp_path / "one", "--num-workers", "1"], cwd=ROOT, env=environment, check=True)
    assert hashes(tmp_path / "one") == expected
    left = []
    for moment in range(10):
        process = subprocess.Popen(
            [*command, tmp_path / "killed"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, start_new_session=True
        )
        time.sleep(seconds * (moment + 0.5) / 10)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left.append(sorted(path.name for path in (tmp_path / "killed").glob(".partial/*")))
        deadline = time.monotonic() + 20
        while members(process.pid):
            assert time.monotonic() < deadline, "a worker outlives the preparation"
            time.sleep(0.05)
    subprocess.run([*command, tmp_path / "killed"], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert hashes(tmp_path / "killed") == expected
    assert sum("buckets" in names for names in left) >= 4, left
    assert not (tmp_path / "killed" / ".partial").exists()


def members(group: int) -> list[int]:
    """The processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found
