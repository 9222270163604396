"""Preparing to URLs: the bytes of a local preparation, on a small disk, wherever and however often it is killed."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run, run_here, succeed, wait_for
from data.documents import documents, hashes
from data.folder_storage import FolderStorage, objects

from gpt2xla import storage as storage_module
from gpt2xla.data.documents import corpus
from gpt2xla.data.documents.corpus import Part, local_parts
from gpt2xla.data.preparation import output_bucket, pipeline
from gpt2xla.data.preparation.options import PrepareConfig
from gpt2xla.data.preparation.sending import MOST_UNSENT
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.errors import InputError, RunFailed
from gpt2xla.processes import lease

SHARD = 3_000  # tokens


class Killed(BaseException):
    """Ends a preparation as SIGKILL does: nothing that it does afterwards reaches the storage."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    FolderStorage.register()
    monkeypatch.setattr(storage_module, "RETRY_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(lease, "EXPIRES_AFTER", 0.0)
    monkeypatch.setattr(output_bucket, "_PIECE_BYTES", 500)
    monkeypatch.setattr(corpus, "_BLOCK_BYTES", 4_000)
    monkeypatch.setattr(corpus, "_ARRAY_CHARACTERS", 1_000)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join(documents(30)))
    (folder / "b.txt").write_text("\n\n".join(documents(15, seed=1)))
    return folder


def parts_of(texts: Path) -> list[Part]:
    return local_parts([texts], split_by="blank-lines", say=lambda note: None)


def prepare(texts: Path, output: str | Path, **options: Any) -> list[str]:
    """Prepare texts in shards of 3,000 bytes, and return what was said. At a URL, `scratch` beside them is used."""
    said: list[str] = []
    defaults = {"shard_size": SHARD, "num_workers": 2, "scratch_dir": str(texts.parent / "scratch")}
    config = PrepareConfig(output_dir=str(output), tokenizer="bytes", **defaults | options)
    pipeline.prepare(parts_of(texts), load_tokenizer("bytes"), config, said.append)
    return said


def left_on_disk(texts: Path) -> list[Path]:
    return [file for file in (texts.parent / "scratch").rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    "options",
    [{}, {"test_fraction": 0.4}, {"max_tokens": 20_000}, {"shard_size": 10**6}],
    ids=["top up", "large test", "limit", "one shard"],
)
def test_the_bytes_are_those_of_a_local_preparation(options: dict[str, Any], texts: Path, tmp_path: Path) -> None:
    prepare(texts, tmp_path / "local", **options)
    prepare(texts, f"folder://{tmp_path}/bucket/data/", **options)
    assert objects(tmp_path / "bucket" / "data") == hashes(tmp_path / "local")
    assert left_on_disk(texts) == []


def test_any_storage_will_do(texts: Path, tmp_path: Path) -> None:
    prepare(texts, tmp_path / "local")
    prepare(texts, "memory://bucket/data")
    files = fsspec.filesystem("memory")
    found = {path.removeprefix("/bucket/data/"): files.cat_file(path) for path in files.find("/bucket/data")}
    assert found == {name: (tmp_path / "local" / name).read_bytes() for name in hashes(tmp_path / "local")}
    files.rm("/bucket", recursive=True)


def test_only_a_complete_set_has_manifests(texts: Path, tmp_path: Path) -> None:
    made: list[str] = []
    FolderStorage.after = staticmethod(made.append)
    prepare(texts, f"folder://{tmp_path}/bucket", test_fraction=0.4)
    order = [path.removeprefix(f"{tmp_path}/bucket/") for path in made if "lease" not in path]
    order = order[: order.index("preparation.json") + 1]
    assert order[0] == ".partial/preparation.json", "it says whose the shards are"
    assert order[-3:] == ["test/manifest.json", "train/manifest.json", "preparation.json"]
    assert sum(name.endswith(".npy") for name in order[:-3]) > 6


def test_a_small_disk_suffices(texts: Path, tmp_path: Path) -> None:
    """With a slow network. There are never more shards here than the two that wait, and one of each split in the making."""
    peak, end = [0, 0], threading.Event()

    def watch() -> None:
        while not end.wait(0.0005):
            sizes = []
            for file in (tmp_path / "scratch").rglob("*.npy"):
                with contextlib.suppress(FileNotFoundError):
                    sizes.append(file.stat().st_size)
            peak[:] = max(peak[0], sum(sizes)), max(peak[1], len(sizes))

    FolderStorage.before = staticmethod(lambda path: time.sleep(0.02 * path.endswith(".npy")))
    watching = threading.Thread(target=watch)
    watching.start()
    prepare(texts, f"folder://{tmp_path}/bucket", test_fraction=0.05, shard_size=1500)
    end.set()
    watching.join()
    shards = list((tmp_path / "bucket").rglob("*.npy"))
    assert len(shards) >= 12
    assert MOST_UNSENT <= peak[1] <= MOST_UNSENT + 2
    assert peak[0] <= (MOST_UNSENT + 2) * (2 * 1500 + 128)


@contextlib.contextmanager
def killed_at(call: int, moment: str) -> Iterator[list[str]]:
    """End a preparation before or after its change number `call` of the storage. Yields the changes up to then."""
    changes: list[str] = []

    def count(path: str) -> None:
        if len(changes) > call:
            raise Killed
        changes.append(path)
        if len(changes) > call and moment == "before":
            raise Killed

    def end(path: str) -> None:
        if len(changes) > call:
            raise Killed

    FolderStorage.before, FolderStorage.after = staticmethod(count), staticmethod(end)
    try:
        yield changes
    finally:
        FolderStorage.register()


def check_what_is_readable(bucket: Path, local: Path) -> None:
    """A split is complete if it has a manifest, and train/ has one only if test/ does."""
    there, whole = (hashes(folder) if folder.exists() else {} for folder in (bucket, local))
    readable = [split for split in ("test", "train") if f"{split}/manifest.json" in there]
    assert readable in ([], ["test"], ["test", "train"])
    for name, digest in whole.items():
        assert there.get(name) == digest or name.split("/")[0] not in readable
    if "preparation.json" in there:
        assert len(readable) == 2


@pytest.mark.parametrize("moment", ["before", pytest.param("after", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [{"shard_size": 7000}, *(pytest.param(o, marks=pytest.mark.slow) for o in ({}, {"test_fraction": 0.4}))],
    ids=["large shards", "top up", "large test"],
)
def test_killed_at_each_call_it_ends_with_the_same_bytes_elsewhere(
    options: dict[str, Any], moment: str, texts: Path, tmp_path: Path
) -> None:
    """At every change of the storage, each time on a machine with an empty disk."""
    (texts / "b.txt").unlink()
    prepare(texts, tmp_path / "local", **options)
    call = resumed = 0
    while True:
        with killed_at(call, moment) as changes, contextlib.suppress(Killed):
            prepare(texts, f"folder://{tmp_path}/bucket", **options)
            assert len(changes) <= call
            break
        shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
        check_what_is_readable(tmp_path / "bucket", tmp_path / "local")
        said = prepare(texts, f"folder://{tmp_path}/bucket", **options)
        resumed += any("resuming after" in line for line in said)
        assert objects(tmp_path / "bucket") == hashes(tmp_path / "local"), f"killed {moment} {changes[-1]}"
        shutil.rmtree(tmp_path / "bucket")
        call += 1
    assert call > 15
    assert resumed > call // 5


def has_shards(bucket: Path) -> bool:
    """Whether a preparation there has something to resume from."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads((bucket / ".partial" / "preparation.json").read_text())["position"] != [0, 0]
    return False


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_by_a_signal_it_resumes_on_an_empty_disk(kills: int, tmp_path: Path) -> None:
    """At random moments, slowed down."""
    pq.write_table(pa.table({"text": documents(3000)}), tmp_path / "texts.parquet", row_group_size=100)
    flags = ["--input", tmp_path / "texts.parquet", "--tokenizer", "bytes", "--shard-size", 60_000, "--num-workers", 2]
    succeed(run("tests/workers/slow_prepare_worker.py", *flags, "--output-dir", tmp_path / "local"))
    flags += ["--output-dir", f"folder://{tmp_path}/bucket", "--scratch-dir", tmp_path / "scratch"]
    command = [sys.executable, "tests/workers/prepare_to_url_worker.py", *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    rng = random.Random(kills)
    killed = resumed = restarts = 0
    while killed < kills:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = ""
        while (line := process.stdout.readline()) and "started" not in line:
            said += line
        resumed += "resuming after" in said
        if killed % 2:
            wait_for(lambda ended=process.poll: has_shards(tmp_path / "bucket") or ended() is not None)
        time.sleep(rng.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:  # it was done before
            assert objects(tmp_path / "bucket") == hashes(tmp_path / "local")
            shutil.rmtree(tmp_path / "bucket")
            restarts += 1
            continue
        killed += 1
        shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
        check_what_is_readable(tmp_path / "bucket", tmp_path / "local")
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert f"folder://{tmp_path}/bucket/train: " in result.stdout
    assert objects(tmp_path / "bucket") == hashes(tmp_path / "local")
    assert resumed >= kills // 4, (resumed, restarts)


def test_a_refusal_keeps_what_is_there_and_the_same_command_resumes(texts: Path, tmp_path: Path) -> None:
    prepare(texts, tmp_path / "local")
    left = 4

    def refuse(path: str) -> None:
        nonlocal left
        left -= path.endswith(".npy")
        if left < 0:
            raise PermissionError("the token has expired")

    FolderStorage.before = staticmethod(refuse)
    with pytest.raises(
        RunFailed, match=r"^folder://.*\.npy could not be written: PermissionError: the token has expired; "
    ):
        prepare(texts, f"folder://{tmp_path}/bucket")
    assert [file.suffix for file in left_on_disk(texts)] == [".lease"]
    FolderStorage.register()
    assert any("resuming after" in line for line in prepare(texts, f"folder://{tmp_path}/bucket"))
    assert objects(tmp_path / "bucket") == hashes(tmp_path / "local")


def test_a_few_failures_of_the_network_are_overcome(texts: Path, tmp_path: Path) -> None:
    prepare(texts, tmp_path / "local")
    tries: Counter[str] = Counter()

    def fail(path: str) -> None:
        tries[path] += 1
        if tries[path] in (1, 2):
            raise ConnectionResetError("the line went dead")

    FolderStorage.before = staticmethod(fail)
    prepare(texts, f"folder://{tmp_path}/bucket")
    assert objects(tmp_path / "bucket") == hashes(tmp_path / "local")


def test_what_is_there_is_only_called_prepared_if_it_is(texts: Path, tmp_path: Path) -> None:
    url, bucket = f"folder://{tmp_path}/bucket", tmp_path / "bucket"
    prepare(texts, url)
    assert prepare(texts, url) == [f"{url} is prepared already: nothing to do"]
    with pytest.raises(InputError, match="bucket was prepared with --shard-size 3000, now 4000"):
        prepare(texts, url, shard_size=4000)
    (bucket / "train" / "shard_000001.npy").unlink()
    with pytest.raises(
        InputError, match=r"train/shard_000001\.npy is missing there; to prepare it again, remove what is"
    ):
        prepare(texts, url)
    (bucket / "preparation.json").unlink()
    with pytest.raises(InputError, match="train/ exists already; remove it or choose another"):
        prepare(texts, url)


def test_another_preparation_that_is_not_finished_is_not_continued(texts: Path, tmp_path: Path) -> None:
    with killed_at(15, "before"), contextlib.suppress(Killed):
        prepare(texts, f"folder://{tmp_path}/bucket")
    with pytest.raises(InputError, match="bucket was prepared with --seed 1061109567, now 5; give the same options"):
        prepare(texts, f"folder://{tmp_path}/bucket", seed=5)


@pytest.mark.parametrize("what", ["piece", "shard", "record"])
def test_what_was_lost_from_the_bucket_is_named(what: str, texts: Path, tmp_path: Path) -> None:
    with killed_at(25, "before"), contextlib.suppress(Killed):
        prepare(texts, f"folder://{tmp_path}/bucket", test_fraction=0.4)
    partial = tmp_path / "bucket" / ".partial"
    if what == "piece":
        for piece in partial.glob("t*-*/*"):
            piece.write_bytes(b"")
    elif what == "shard":
        (tmp_path / "bucket" / "train" / "shard_000000.npy").unlink()
    else:
        (partial / "preparation.json").write_text("{")
    with pytest.raises(InputError, match=r"(is|and) (missing|damaged)|missing or damaged"):
        prepare(texts, f"folder://{tmp_path}/bucket", test_fraction=0.4)


def test_two_machines_at_once_are_refused(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRES_AFTER", 60.0)
    monkeypatch.setattr(lease, "RENEWED_EVERY", 0.1)
    url = f"folder://{tmp_path}/bucket"
    refused: list[str] = []

    def begin_another(path: str) -> None:
        if path.endswith("shard_000002.npy") and not refused:
            refused.append("")
            with pytest.raises(
                InputError, match=r"--output-dir folder://.*: in use by process \d+ on .*wait for it"
            ) as error:
                prepare(texts, url, scratch_dir=str(tmp_path / "elsewhere"))
            refused.append(str(error.value))

    FolderStorage.before = staticmethod(begin_another)
    prepare(texts, url)
    assert len(refused) == 2
    prepare(texts, tmp_path / "local")
    assert objects(tmp_path / "bucket") == hashes(tmp_path / "local")


def test_a_disk_that_is_too_small_for_a_few_shards_is_refused(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 5999))
    prepare(texts, f"folder://{tmp_path}/bucket", shard_size=999)
    with pytest.raises(
        InputError, match=r"--scratch-dir .*: the shards that wait to be sent will take at least .* --shard-size"
    ):
        prepare(texts, f"folder://{tmp_path}/other", shard_size=1000)


def test_conversations_are_sent_when_they_are_whole(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(30)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    flags = ["--input", tmp_path / "chats.jsonl", "--tokenizer", "bytes", "--add-special-tokens", "--seq-length", 64]
    flags += ["--shard-size", 500, "--scratch-dir", tmp_path / "scratch", "--output-dir"]
    succeed(run_here("scripts/prepare_chat.py", *flags, tmp_path / "local"))
    call, url = 0, f"folder://{tmp_path}/bucket"
    while True:
        with killed_at(call, "before"), contextlib.suppress(Killed):
            said = succeed(run_here("scripts/prepare_chat.py", *flags, url))
            assert f"{url}/train: " in said
            break
        shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
        check_what_is_readable(tmp_path / "bucket", tmp_path / "local")
        succeed(run_here("scripts/prepare_chat.py", *flags, url))
        assert objects(tmp_path / "bucket") == hashes(tmp_path / "local")
        shutil.rmtree(tmp_path / "bucket")
        call += 1
    assert call > 10
    assert "nothing to do" in succeed(run_here("scripts/prepare_chat.py", *flags, url))
    assert TokenStream(f"{url}/test").is_masked


def test_drawings_as_text_are_sent_too(tmp_path: Path) -> None:
    files = sorted((ROOT / "tests" / "sketches").rglob("*.ndjson"))
    flags = [
        "--input",
        *files,
        "--as-text",
        "--num-workers",
        1,
        "--test-fraction",
        0.25,
        "--scratch-dir",
        tmp_path / "scratch",
        "--output-dir",
    ]
    url = f"folder://{tmp_path}/bucket"
    for output in (tmp_path / "local", url):
        succeed(run_here("scripts/prepare_sketches.py", *flags, output))
    assert objects(tmp_path / "bucket") == hashes(tmp_path / "local")
    assert "nothing to do" in succeed(run_here("scripts/prepare_sketches.py", *flags, url))
    (tmp_path / "bucket" / "test" / "sketches.txt").unlink()
    assert "test/sketches.txt is missing there" in run_here("scripts/prepare_sketches.py", *flags, url).stderr


def test_what_is_prepared_at_a_url_can_be_inspected_there(texts: Path, tmp_path: Path) -> None:
    prepare(texts, f"folder://{tmp_path}/bucket")
    url = f"file://{tmp_path}/bucket"
    said = succeed(run("scripts/inspect_data.py", url, XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path)))
    assert f"{url}/train: " in said
    assert f"{url}/test: " in said
