"""The object server, and what `gpt2xla.storage.Bucket` makes of it: S3 by s3fs, GCS by gcsfs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import wait_for

from gpt2xla import storage
from gpt2xla.storage import Bucket
from object_server import ObjectServer, object_server

_COUNT = iter(range(1000))


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request: pytest.FixtureRequest) -> Iterator[ObjectServer]:
    with object_server(request.param) as running, running.reached_from_here():
        yield running


@pytest.fixture
def bucket(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A folder of its own; the tries of a Bucket follow without a wait."""
    monkeypatch.setattr(storage, "RETRY_WAITS", (0.0, 0.0, 0.0))
    yield Bucket(server.at(f"folder-{next(_COUNT)}"), "--checkpoints-dir")
    server.clear()


def name_in_bucket(bucket: Bucket, name: str) -> str:
    return f"{bucket.url.split('/', 3)[3]}/{name}"


def test_objects_are_written_read_listed_and_removed(server: ObjectServer, bucket: Bucket) -> None:
    content = bytes(range(256)) + b"\r\n--==0\n"
    assert bucket.read("a/b") is None
    assert bucket.files() == {}
    bucket.write("a/b", content)
    bucket.write("c", b"")
    assert bucket.read("a/b") == content
    assert server.read(name_in_bucket(bucket, "a/b")) == content
    assert bucket.files() == {"a/b": len(content), "c": 0}
    assert bucket.files("a") == {"a/b": len(content)}
    bucket.write("a/b", b"other")
    assert bucket.read("a/b") == b"other"
    bucket.remove(["a/b", "never there"])
    assert bucket.files() == {"c": 0}
    assert server.objects(name_in_bucket(bucket, "")) == {name_in_bucket(bucket, "c"): 0}
    server.remove(name_in_bucket(bucket, ""))
    assert bucket.files() == {}


def test_of_several_that_create_an_object_one_succeeds(server: ObjectServer, bucket: Bucket) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(5):
            name = f"lease/{number}"
            made = list(pool.map(lambda who, name=name: bucket.create(name, f"holder {who}".encode()), range(8)))
            assert sum(made) == 1
            assert server.read(name_in_bucket(bucket, name)) == f"holder {made.index(True)}".encode()


def test_an_object_is_created_although_the_answer_was_lost(server: ObjectServer, bucket: Bucket) -> None:
    server.lose(times=1, method="PUT|POST", key="*/lease")
    assert bucket.create("lease", b"mine")
    assert not bucket.create("lease", b"theirs")
    assert server.read(name_in_bucket(bucket, "lease")) == b"mine"


def test_files_come_and_go_several_at_once(server: ObjectServer, bucket: Bucket, tmp_path: Path) -> None:
    files = {f"step/{number}": tmp_path / str(number) for number in range(5)}
    for number, file in enumerate(files.values()):
        file.write_bytes(os.urandom(1000 * number))
    (tmp_path / "4").write_bytes(os.urandom(40 << 20))  # in parts
    bucket.send(files)
    assert sorted(bucket.files().values()) == [0, 1000, 2000, 3000, 40 << 20]
    fetched = {name: tmp_path / "back" / name for name in files}
    bucket.fetch(fetched)
    assert [file.read_bytes() for file in fetched.values()] == [file.read_bytes() for file in files.values()]
    with pytest.raises(FileNotFoundError):
        bucket.fetch({"step/9": tmp_path / "9"})


def test_times_are_those_of_the_servers_clock(server: ObjectServer, bucket: Bucket) -> None:
    server.set_clock(-86400)
    bucket.write("early", b"")
    server.set_clock(3600)
    bucket.write("late", b"")
    server.set_clock(0)
    early, late = bucket.modified("early"), bucket.modified("late")
    assert early
    assert late
    assert abs((late - early).total_seconds() - 86400 - 3600) < 60
    assert abs(late.timestamp() - time.time() - 3600) < 60


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status: int, server: ObjectServer, bucket: Bucket) -> None:
    bucket.write("before", b"content")
    server.fail(status, times=1, method="PUT|POST", key="*/after")
    server.fail(status, times=1, method="GET|HEAD", key="*/before")
    bucket.write("after", b"content")
    assert bucket.read("before") == b"content"
    assert bucket.files() == {"before": 7, "after": 7}
    assert server.faults_left() == []


def test_bodies_that_are_cut_are_sent_and_read_again(server: ObjectServer, bucket: Bucket, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(9 << 20))
    server.cut(times=1, method="PUT|POST", key="*/file")
    bucket.send({"file": file})
    server.cut(times=1, method="GET", skip=1, key="*/file")
    bucket.fetch({"file": tmp_path / "back"})
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    server.cut(times=1, method="GET", key="*/file")
    assert bucket.read("file") == file.read_bytes()
    assert [request.fault for request in server.requests() if request.fault == "cut"] == ["cut"] * 3


def test_bodies_can_be_slow(server: ObjectServer, bucket: Bucket) -> None:
    server.slow(100_000, key="*/slow")
    begun = time.monotonic()
    bucket.write("slow", bytes(50_000))
    bucket.read("slow")
    assert time.monotonic() - begun >= 1


def test_expired_credentials_are_refused_at_once(
    server: ObjectServer, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.write("a", b"1")
    # gcsfs itself asks six times within 31 s: it may have renewed them.
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0)))
    server.expire_credentials()
    try:
        for refused in (lambda: bucket.write("a", b"2"), lambda: bucket.read("a"), lambda: bucket.create("b", b"")):
            with pytest.raises(PermissionError, match="could not be"):
                refused()
        with pytest.raises(PermissionError):
            bucket.files()
    finally:
        server.renew_credentials()
    bucket.write("a", b"2")
    assert bucket.read("a") == b"2"


def test_lists_can_be_late(server: ObjectServer, bucket: Bucket) -> None:
    bucket.write("old", b"")
    server.list_late(2)
    time.sleep(2)
    bucket.write("new", b"1")
    assert bucket.files() == {"old": 0}
    assert bucket.read("new") == b"1"
    time.sleep(2)
    assert bucket.files() == {"old": 0, "new": 1}
    server.list_late(0)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_process_is_killed_at_a_request(before: bool, server: ObjectServer) -> None:
    url = server.at(f"killed-{next(_COUNT)}")
    code = (
        "import sys\nfrom gpt2xla.storage import Bucket\nbucket = Bucket(sys.argv[1], 'x')\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "for number in range(9): bucket.write(str(number), b'1')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | server.environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    prefix = url.split("/", 3)[3]
    server.kill(process.pid, before, skip=4, method="PUT|POST", key=f"{prefix}/*")
    process.communicate("\n")
    assert process.returncode == -signal.SIGKILL
    assert set(server.objects(prefix)) == {f"{prefix}/{number}" for number in range(4 if before else 5)}


def test_a_file_on_its_way_keeps_no_process_from_ending(server: ObjectServer, tmp_path: Path) -> None:
    url, file = server.at(f"ended-{next(_COUNT)}"), tmp_path / "file"
    file.write_bytes(bytes(1_000_000))
    code = (
        "import sys, threading\nfrom pathlib import Path\nfrom gpt2xla.storage import Bucket\n"
        "bucket = Bucket(sys.argv[1], 'x')\n"
        "threading.Thread(target=bucket.send, args=[{'file': Path(sys.argv[2])}], daemon=True).start()\n"
        "sys.stdin.readline()"
    )
    prefix = url.split("/", 3)[3]
    server.slow(5_000, method="PUT|POST", key=f"{prefix}/*")
    process = subprocess.Popen(
        [sys.executable, "-c", code, url, str(file)], stdin=subprocess.PIPE, text=True,
        env=os.environ | server.environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    wait_for(lambda: any(request.fault and request.key.startswith(prefix) for request in server.requests()))
    process.communicate("\n", timeout=60)  # sending takes 200 s
    assert process.returncode == 0
    server.clear()
