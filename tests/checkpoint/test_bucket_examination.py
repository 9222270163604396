"""`gpt2xla doctor --bucket`: storages that do what a run needs, and such as do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from conftest import ROOT, run, wait_for
from fsspec.implementations.memory import MemoryFileSystem

from gpt2xla import storage
from gpt2xla.checkpoint.bucket import examination
from gpt2xla.checkpoint.bucket.examination import examine, machine_zone
from gpt2xla.errors import InputError


class Storage(MemoryFileSystem):
    """In memory, with what a test does to it. Each call of a method is counted."""

    protocol = "trial"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    hidden = refuses = overwrites = hangs = keeps = garbles = ""

    def find(self, path: str, **options: Any) -> Any:
        return {} if self.hidden else super().find(path, **options)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if self.hangs:
            threading.Event().wait(30)
        if self.refuses:
            raise PermissionError(self.refuses)
        super().pipe_file(path, value, mode="overwrite" if self.overwrites else mode, **options)

    def rm_file(self, path: str) -> None:
        if not self.keeps:
            super().rm_file(path)

    def put_file(self, source: str, path: str, **options: Any) -> None:
        content = Path(source).read_bytes()
        super().pipe_file(path, content[:-1] + b"?" if self.garbles else content)


@pytest.fixture(autouse=True)
def trial(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    fsspec.register_implementation("trial", Storage, clobber=True)
    monkeypatch.setattr(storage, "RETRY_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(examination, "_LISTED_WITHIN", 0.3)
    monkeypatch.setattr(examination, "_MOST_BYTES", 4 << 20)
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")  # where nobody answers
    Storage.store.clear()
    yield monkeypatch
    Storage.store.clear()


def findings(url: str = "trial://bucket/run") -> tuple[list[str], dict[str, str]]:
    rows: dict[str, str] = {}
    return examine(url, rows.__setitem__), rows


def test_a_good_bucket_has_no_problems_and_nothing_stays_there() -> None:
    Storage().pipe_file("/bucket/run/latest", b"step-00000100")
    problems, rows = findings()
    assert problems == []
    assert list(rows) == [
        "write", "list", "create", "delete", "upload", "download", "region", "checkpoint", "spot machine", "--save-interval",
    ]  # fmt: skip
    assert rows["list"] == "a new object at once"
    assert list(Storage.store) == ["/bucket/run/latest"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("hidden", "lists a new object only after"),
        ("overwrites", "never start a second run there"),
        ("garbles", "does not return what was uploaded"),
    ],
)
def test_what_a_run_cannot_do_without_is_a_problem(fault: str, words: str, trial: pytest.MonkeyPatch) -> None:
    trial.setattr(Storage, fault, "yes")
    (problem,), rows = findings()
    assert words in problem
    assert "checkpoint" in rows, "the rest is examined too"
    assert not Storage.store


def test_an_object_that_stays_is_a_problem(trial: pytest.MonkeyPatch) -> None:
    trial.setattr(Storage, "keeps", "yes")
    problems, _ = findings()
    assert "shows an object that was deleted" in problems[0]


@pytest.mark.parametrize(
    ("message", "scheme", "fix"),
    [
        ("Anonymous caller does not have storage.objects.create access", "gs", "gcloud auth application-default login"),
        ("Invalid Credentials, 401", "gs", "gcloud auth application-default login"),
        ("Forbidden: https://storage.googleapis.com/b", "gs", "roles/storage.objectUser"),
        ("NoSuchBucket: The specified bucket does not exist", "s3", "aws s3 mb s3://name"),
        ("An error occurred (403): Access Denied", "s3", "allow s3:ListBucket"),
        ("Unable to locate credentials", "s3", "AWS_ACCESS_KEY_ID"),
        ("403 Forbidden", "hf", "use a token that may write"),
        ("Connection reset by peer", "gs", "check address, credentials and network"),
    ],
)
def test_each_refusal_has_a_fix(message: str, scheme: str, fix: str) -> None:
    assert fix in examination._fix(f"{scheme}://name/run", message)


def test_a_bucket_that_refuses_is_one_line(trial: pytest.MonkeyPatch) -> None:
    trial.setattr(Storage, "refuses", "Forbidden")
    (problem,), rows = findings()
    assert "trial://bucket/run" in problem
    assert "Forbidden" in problem
    assert rows == {"stopped": "see below"}


def test_a_storage_that_does_not_answer_is_given_up(trial: pytest.MonkeyPatch) -> None:
    trial.setattr(Storage, "hangs", "yes")
    trial.setattr(examination, "SECONDS", 0.3)
    (problem,), _ = findings()
    assert "did not answer within" in problem


@pytest.mark.parametrize("url", ["checkpoints", "/data/checkpoints"])
def test_a_folder_is_no_bucket(url: str) -> None:
    with pytest.raises(InputError, match="name a URL"):
        findings(url)


@pytest.mark.parametrize(
    ("megabytes", "checkpoint", "spot", "interval"),
    [
        (1000, "1.5 GB: 1 s to upload", "enough to save its last step", "not below 3 s"),
        (60, "1.5 GB: 25 s to upload", "enough to save its last step", "not below 50 s"),
        (59, "1.5 GB: 25 s to upload", "since the last upload are lost", "not below 51 s"),
        (1, "1.5 GB: 25 min to upload", "since the last upload are lost", "not below 50 min"),
    ],
)
def test_what_a_rate_means_for_a_run(megabytes: float, checkpoint: str, spot: str, interval: str) -> None:
    """GPT-2 has 124,439,808 parameters; with Adam's two averages in fp32 that is 1.493 GB."""
    rows = dict(examination._about_checkpoints(megabytes * 1e6))
    assert checkpoint in rows["checkpoint"]
    assert spot in rows["spot machine"]
    assert interval in rows["--save-interval"]


class Metadata(BaseHTTPRequestHandler):
    """Google Cloud's metadata server, and a bucket of its storage."""

    def do_GET(self) -> None:
        is_asked = self.path == "/computeMetadata/v1/instance/zone" and self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200 if is_asked else 403)
        self.end_headers()
        self.wfile.write(b"projects/123456/zones/us-central1-a" if is_asked else b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def in_us_central1(trial: pytest.MonkeyPatch) -> Iterator[None]:
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    trial.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def test_a_machine_of_google_cloud_knows_its_zone(in_us_central1: None) -> None:
    assert machine_zone() == "us-central1-a"


def test_elsewhere_there_is_no_zone() -> None:
    assert machine_zone() is None


@pytest.mark.parametrize(
    ("location", "row", "problem"),
    [
        ("us-central1", "us-central1, as this machine", None),
        ("us", "us, which is several", None),
        ("europe-west4", "europe-west4, but this machine is in us-central1-a", "--location=us-central1"),
        (None, "unknown, and this machine is in us-central1-a", None),
    ],
)
def test_a_bucket_in_another_region_is_a_problem(
    location: str | None, row: str, problem: str | None, in_us_central1: None, trial: pytest.MonkeyPatch
) -> None:
    trial.setattr(examination, "bucket_location", lambda url: location)
    problems, rows = findings()
    assert row in rows["region"]
    assert [problem in line for line in problems if problem] == ([True] if problem else [])
    assert len(problems) == (problem is not None)


def test_the_program(tmp_path: Path) -> None:
    for program in ("-m gpt2xla.doctor", "-m gpt2xla doctor"):
        well = run(program, "--bucket", f"file://{tmp_path}/run")
        assert well.returncode == 0, well.stdout + well.stderr
        assert "no problems found" in well.stdout
        assert list((tmp_path / "run").iterdir()) == []
    assert run("-m gpt2xla.doctor", "--bucket", "nonsense://bucket").returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_stays_after_an_interrupt(number: signal.Signals, tmp_path: Path) -> None:
    """It is interrupted where it waits for the list, in which the object never appears."""
    program = f"""
import fsspec.implementations.local as local, time, sys
local.LocalFileSystem.find = lambda *_, **__: {{}}
sys.argv = ["doctor", "--bucket", "file://{tmp_path}/run"]
from gpt2xla.doctor import main
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for(lambda: list(tmp_path.glob("run/*/first")))
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_real_clients(kind: str) -> None:
    """Against servers of S3 and GCS on this machine, as s3fs and gcsfs reach them."""
    object_server = pytest.importorskip("object_server").object_server
    with object_server(kind) as server:
        program, missing = "-m gpt2xla.doctor", server.url.replace("bucket", "nobody", 1)
        well = run(program, "--bucket", server.url, **server.environment)
        assert well.returncode == 0, well.stdout + well.stderr
        assert server.objects() == {}
        ill = run(program, "--bucket", missing, **server.environment)
        assert ill.returncode == 1
        assert "it does not exist" in ill.stdout
        server.fail(403, method="PUT|POST")
        ill = run(program, "--bucket", server.url, **server.environment)
        assert ill.returncode == 1
        assert ill.stdout.count("problem: ") == 1, ill.stdout
        assert server.objects() == {}
