"""Stores that take connections and do not answer, or take their time."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from gpt2xla import storage
from gpt2xla.storage import Bucket, opened
from object_server import ObjectServer, object_server

KINDS = ("s3", "gs")
REQUESTS_PER_TRY = 2  # botocore asks twice, gcsfs whether it is a file and whether it is a folder


class SilentServer:
    """Takes connections, reads from them only if asked to, and never answers."""

    def __init__(self, reads: bool) -> None:
        self._socket, self.reads = socket.create_server(("127.0.0.1", 0), backlog=64), reads
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._take, daemon=True).start()

    @property
    def port(self) -> int:
        return self._socket.getsockname()[1]

    def _take(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections.append(connection)
            if self.reads:
                threading.Thread(target=self._read, args=[connection], daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        try:
            while connection.recv(1 << 16):
                pass
        except OSError:
            pass

    def close(self) -> None:
        for open_socket in (self._socket, *self.connections):
            open_socket.close()


@pytest.fixture
def silent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SilentServer]:
    """A server, reached as the first word of the parameter says; the second one is how it is silent."""
    kind, how = request.param.split()
    server = SilentServer(how == "reads")
    monkeypatch.setattr(storage, "RETRY_WAITS", (0.0, 0.0, 0.0))
    with ObjectServer(kind, server.port).reached_from_here():
        yield server
    server.close()


@pytest.mark.parametrize("silent", [f"{kind} reads" for kind in KINDS], indirect=True)
@pytest.mark.parametrize("what", ["read", "write", "listed", "fetched"])
def test_the_tries_of_clients_do_not_multiply_ours(
    what: str, silent: SilentServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(storage, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr("aiobotocore.endpoint.asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0)))
    kind = request.node.callspec.params["silent"].split()[0]
    bucket = Bucket(f"{kind}://bucket/run", "--checkpoints-dir")
    ask = {
        "read": lambda: bucket.read("a"), "write": lambda: bucket.write("a", b"1"), "listed": lambda: bucket.files(),
        "fetched": lambda: bucket.fetch({"a": tmp_path / "a"}),
    }[what]  # fmt: skip
    problem = r"could not be \w+ in 4 tries: .*(no answer|imeout|through)"
    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match=problem):
        ask()
    assert len(silent.connections) <= 4 * REQUESTS_PER_TRY
    lines = [record.getMessage() for record in caplog.records if record.name == storage.__name__]
    assert [line.endswith("; trying again") for line in lines] == [True] * 3
    with pytest.raises(OSError, match="could not be"):
        ask()
    assert len(silent.connections) <= 5 * REQUESTS_PER_TRY, "a silent store is asked once, from then on"


@pytest.mark.parametrize("silent", [f"{kind} deaf" for kind in KINDS], indirect=True)
def test_a_store_that_takes_no_bytes_is_given_up(
    silent: SilentServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(storage, "PART_SECONDS", 0.2)
    monkeypatch.setattr(storage, "SILENT_SECONDS", 0.1)
    kind = request.node.callspec.params["silent"].split()[0]
    bucket, file = Bucket(f"{kind}://bucket/run", "--checkpoints-dir"), tmp_path / "file"
    file.write_bytes(bytes(8 << 20))  # more than fits into buffers
    for upload in (lambda: bucket.write("a", file.read_bytes()), lambda: bucket.send({"a": file})):
        with pytest.raises(OSError, match=r"could not be written.*: Silence: (nothing got through|no answer) within"):
            upload()


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_may_take_longer_than_silence_may(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "SILENT_SECONDS", 0.7)
    monkeypatch.setattr(storage, "RETRY_WAITS", (0.0,) * 9)
    with object_server(kind) as server, server.reached_from_here():
        bucket, content = Bucket(server.at("run"), "--checkpoints-dir"), bytes(range(256)) * 500
        bucket.write("a", content)
        server.slow(100_000, method="GET")
        bucket.fetch({"a": tmp_path / "a"})
        assert (tmp_path / "a").read_bytes() == content


def test_an_upload_is_awaited_as_long_as_it_moves() -> None:
    async def upload(parts: int) -> str:
        for _ in range(parts):
            await asyncio.sleep(0.02)
            moved.relative_update(1)
        await asyncio.sleep(0 if parts else 60)
        return "sent"

    moved = fsspec.Callback()
    assert asyncio.run(storage._while_it_moves(upload(20), moved, 0.1)) == "sent"
    with pytest.raises(storage.Silence, match="nothing got through"):
        asyncio.run(storage._while_it_moves(upload(0), moved, 0.1))


def test_what_users_have_set_counts_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 7}})
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon", "requests_timeout": 9})
    monkeypatch.setitem(fsspec.config.conf, "https", {"client_kwargs": {"headers": {"a": "b"}}})
    limits = opened("s3://bucket/run", "--x")[0].config_kwargs
    assert (limits["read_timeout"], limits["connect_timeout"]) == (7, storage.SILENT_SECONDS)
    assert opened("gs://bucket/run", "--x")[0].requests_timeout == 9
    web = opened("https://localhost/file", "--x")[0].client_kwargs
    assert (web["headers"], web["timeout"].sock_read) == ({"a": "b"}, storage.SILENT_SECONDS)
