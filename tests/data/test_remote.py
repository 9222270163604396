"""Shards behind a URL: fetched as they are read, checked, kept, shared between processes, removed when too many."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from conftest import ROOT, SMALL_RUN, random_samples, run, succeed, training_losses
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry as fsspec_classes

from gpt2xla import storage as storage_module
from gpt2xla.data.preparation.rows import write_rows
from gpt2xla.data.remote import Cache, RemoteFolder
from gpt2xla.data.shards import MANIFEST, Manifest, ShardEntry, TokenStream
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.errors import InputError, RunFailed
from gpt2xla.files import file_sha256

TOKENS = np.random.default_rng(0).integers(0, 97, 10_000).astype(np.uint16)
SHARD_BYTES = 2 * 2000 + 128  # of five


class Storage(LocalFileSystem):
    """Local files behind `storage://`, which count how often each is opened, and fail as asked."""

    protocol = "storage"
    cachable = False
    opened: ClassVar[list[str]] = []
    failures = 0

    def size(self, path: str) -> int:
        return super().size(path)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        Storage.opened.append(Path(path).name)
        if Storage.failures:
            Storage.failures -= 1
            raise ConnectionResetError("the line went dead")
        return super()._open(path, mode, **kwargs)


@pytest.fixture(autouse=True)
def storage(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("storage", Storage, clobber=True)
    monkeypatch.setattr(Storage, "opened", [])
    monkeypatch.setattr(Storage, "failures", 0)
    monkeypatch.setattr(storage_module, "RETRY_WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "bucket" / "train", TOKENS)


def write_source(folder: Path, tokens: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, part in enumerate(np.split(tokens, 5)):
        file = folder / f"shard_{number}.npy"
        np.save(file, part)
        entries.append(ShardEntry(file.name, len(part), file_sha256(file)))
    Manifest("none", "0" * 64, 97, None, "uint16", len(tokens), 1, 1, tuple(entries)).save(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def stream_of(source: Path, cache: Cache) -> TokenStream:
    return TokenStream(f"storage://{source}", cache=cache)


def shards_in(cache: Cache) -> list[str]:
    return sorted(file.name for file in cache.folder.glob("*/shard*"))


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def shards_opened() -> list[str]:
    return [name for name in Storage.opened if name.startswith("shard")]


def test_it_reads_as_the_folder_itself(source: Path, cache: Cache) -> None:
    here, there = TokenStream(source), stream_of(source, cache)
    assert (there.length, there.fingerprint, there.dtype) == (here.length, here.fingerprint, here.dtype)
    for start, count in ((9_000, 1000), (0, 10), (1990, 4020), (0, 10_000)):
        assert (there.read(start, count) == TOKENS[start : start + count]).all()


def test_shards_come_when_they_are_read_and_the_next_one_ahead(source: Path, cache: Cache) -> None:
    stream = stream_of(source, cache)
    assert shards_in(cache) == [], "nothing is fetched to open it"
    stream.read(2500, 10)
    wait_for(lambda: shards_in(cache) == ["shard_1.npy", "shard_2.npy"])
    stream.read(4500, 10)
    wait_for(lambda: shards_in(cache) == ["shard_1.npy", "shard_2.npy", "shard_3.npy"])
    assert sorted(shards_opened()) == ["shard_1.npy", "shard_2.npy", "shard_3.npy"], "each once"


def test_masks_come_when_they_are_read_and_are_checked(tmp_path: Path, cache: Cache) -> None:
    source = tmp_path / "bucket" / "rows"
    write_rows(source, random_samples(40, 9, seed=0), load_tokenizer("bytes"), row_length=11, shard_size=101)
    here, there = TokenStream(source), stream_of(source, cache)
    assert there.fingerprint == here.fingerprint
    assert (there.trained(150, 60) == here.trained(150, 60)).all()
    assert shards_in(cache) == ["shard_000001.mask", "shard_000002.mask"]
    (source / "shard_000000.mask").write_bytes(bytes(13))
    with pytest.raises(InputError, match=r"shard_000000\.mask is not what its manifest says"):
        there.trained(0, 10)
    (source / "shard_000000.mask").unlink()
    with pytest.raises(InputError, match=r"shard_000000\.mask is missing although its manifest names it"):
        there.verify()


def test_a_second_run_fetches_nothing_again(source: Path, cache: Cache) -> None:
    stream_of(source, cache).read(0, 10_000)
    Storage.opened.clear()
    stream_of(source, cache).read(0, 10_000)
    assert shards_opened() == []


def test_other_data_at_the_same_url_is_not_mistaken(source: Path, cache: Cache) -> None:
    stream_of(source, cache).read(0, 10_000)
    write_source(source, TOKENS[::-1])
    assert (stream_of(source, cache).read(0, 10_000) == TOKENS[::-1]).all()


def test_a_few_failures_are_overcome_and_many_are_reported(source: Path, cache: Cache) -> None:
    stream = stream_of(source, cache)
    Storage.failures = 3
    assert (stream.read(0, 100) == TOKENS[:100]).all()
    wait_for(lambda: len(shards_in(cache)) == 2)
    Storage.failures = 1000
    with pytest.raises(RunFailed, match=r"shard_4\.npy could not be fetched in 4 tries: .*the line went dead"):
        stream.read(9000, 100)
    with pytest.raises(InputError, match=r"--train-dir .*manifest\.json cannot be read: .*the line went dead"):
        stream_of(source, cache)


def test_a_download_that_ends_early_is_tried_again(source: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(source, cache)
    monkeypatch.setattr(Storage, "size", lambda self, path: 5000)
    with pytest.raises(RunFailed, match=rf"in 4 tries: .*{SHARD_BYTES} of 5000 bytes arrived"):
        stream.read(0, 10)
    assert shards_opened() == ["shard_0.npy"] * 4
    assert shards_in(cache) == []


def test_a_damaged_or_missing_shard_is_named(source: Path, cache: Cache) -> None:
    stream = stream_of(source, cache)
    content = bytearray((source / "shard_2.npy").read_bytes())
    content[-5] ^= 1
    (source / "shard_2.npy").write_bytes(content)
    with pytest.raises(InputError, match=rf"storage://{source}/shard_2.npy is not what its manifest says"):
        stream.read(4500, 10)
    (source / "shard_2.npy").unlink()
    with pytest.raises(InputError, match=rf"storage://{source}/shard_2.npy is missing"):
        stream.read(4500, 10)
    assert "shard_2.npy" not in shards_in(cache)


def test_a_damaged_copy_here_is_found_by_verifying(source: Path, cache: Cache) -> None:
    stream = stream_of(source, cache)
    stream.verify()
    assert len(shards_in(cache)) == 5
    file = next(cache.folder.glob("*/shard_3.npy"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"{file} is not what manifest.json says"):
        stream.verify()


def test_without_a_manifest_it_is_refused(source: Path, cache: Cache) -> None:
    (source / MANIFEST).unlink()
    with pytest.raises(InputError, match=rf"--train-dir storage://{source} has no manifest.json"):
        stream_of(source, cache)


@pytest.mark.parametrize(
    ("url", "fix"),
    [
        ("gs://bucket/x", "pip install gcsfs"),
        ("s3://bucket/x", "pip install s3fs"),
        ("nosuch://x", "there is no nosuch://"),
    ],
)
def test_a_missing_package_is_named(url: str, fix: str, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, protocol in (("gcsfs", "gs"), ("s3fs", "s3")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(fsspec_classes, protocol, raising=False)  # by another test
    with pytest.raises(InputError, match=rf"--train-dir {url}.*{fix}") as error:
        TokenStream(url, cache=cache)
    assert "\n" not in str(error.value)


def test_the_shards_longest_unread_make_room(source: Path, cache: Cache) -> None:
    limited = Cache(cache.folder, 3 * SHARD_BYTES)
    stream = stream_of(source, limited)
    for start in (0, 2000, 4000, 6000, 8000, 0, 2000):  # two epochs
        assert (stream.read(start, 2000) == TOKENS[start : start + 2000]).all()
        wait_for(lambda: not stream._remote._ahead.is_alive())
        here = shards_in(limited)
        assert len(here) <= 3
        assert f"shard_{start // 2000}.npy" in here
        assert f"shard_{(start // 2000 + 1) % 5}.npy" in here, "the next one is not removed for it"


def test_what_another_reader_makes_room_for_can_still_be_read(source: Path, cache: Cache) -> None:
    one_shard = Cache(cache.folder, SHARD_BYTES)
    folders = [RemoteFolder(f"storage://{source}", "--train-dir", one_shard, MANIFEST) for _ in range(2)]
    shards = json.loads((source / MANIFEST).read_text())["shards"]
    with folders[0].at_hand("shard_0.npy", shards[0]["sha256"]) as file:
        tokens = np.load(file, mmap_mode="r")
        other = threading.Thread(target=make_room, args=(folders[1], shards[1]["sha256"]))
        other.start()
        wait_for(lambda: shards_in(cache) == ["shard_0.npy", "shard_1.npy"])
        time.sleep(0.1)
        assert file.exists(), "inside the block it is not removed, whatever the limit"
    other.join()
    assert len(shards_in(cache)) <= 1  # within the limit; which one is left depends on who ended first, if any
    assert (tokens == TOKENS[:2000]).all(), "what is mapped stays readable"


def make_room(folder: RemoteFolder, sha256: str) -> None:
    with folder.at_hand("shard_1.npy", sha256):
        pass


def test_several_readers_at_once_fetch_each_shard_once(source: Path, cache: Cache) -> None:
    streams = [stream_of(source, cache) for _ in range(6)]
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda s=stream: results.append(bool((s.read(0, 10_000) == TOKENS).all())))
        for stream in streams
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6
    assert sorted(shards_opened()) == [f"shard_{number}.npy" for number in range(5)]


SLOW_READER = """
import sys, time
from pathlib import Path
from gpt2xla.data import remote
from gpt2xla.data.remote import Cache
from gpt2xla.data.shards import TokenStream
def download(files, source, target):
    target.write_bytes(b"half")
    print("began", flush=True)
    time.sleep(60)
remote.download = download
TokenStream(sys.argv[1], cache=Cache(Path(sys.argv[2]))).read(0, 1)
"""


def test_a_killed_process_leaves_neither_half_a_shard_nor_a_lock(source: Path, cache: Cache) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_READER, f"file://{source}", str(cache.folder)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "began\n"
    process.kill()
    process.wait()
    assert list(cache.folder.glob("*/.shard_0.npy.partial")), "it was in the middle"
    assert shards_in(cache) == []
    assert (TokenStream(f"file://{source}", cache=cache).read(0, 10_000) == TOKENS).all()


def test_a_run_trains_on_urls_as_on_folders(source: Path, data: Path, tmp_path: Path) -> None:
    cached = ["--data-cache", tmp_path / "cache", "--data-cache-gb", "0.0001"]
    for name, prefix in (("here", ""), ("there", "file://")):
        flags = ["--train-dir", f"{prefix}{source}", "--valid-dir", data / "test", "--checkpoints-dir", tmp_path / name]
        succeed(run("run_pretrain.py", *flags, *cached, *SMALL_RUN, "--train-steps", 4))
    assert training_losses(tmp_path / "there") == training_losses(tmp_path / "here")
    for flag, reason in (
        ("--shuffle", "--shuffle reads all over"),
        ("--no-shuffle", "the shard that is read and the next"),
    ):
        result = run(
            "run_pretrain.py", "--train-dir", f"file://{source}", "--valid-dir", data / "test", *SMALL_RUN, flag,
            "--data-cache", tmp_path / "cache", "--data-cache-gb", "0.000007", "--checkpoints-dir", tmp_path / "refused",
        )  # fmt: skip
        assert result.returncode == 2
        assert "--data-cache-gb 7e-06 is too small" in result.stderr
        assert reason in result.stderr
