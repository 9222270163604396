"""The side of the test: starts the server, sets its faults, looks at its objects. It talks plain HTTP, which a process that
forks may do."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import fsspec

from . import faults

_ROOT = Path(__file__).resolve().parents[2]
_BUCKET = "bucket"


class Request(NamedTuple):
    """A request that arrived. `status` is None if it was not answered; `fault` is what was done to it."""

    method: str
    key: str
    query: str
    status: int | None
    fault: str | None


class ObjectServer:
    """A running server.

    Attributes:
        url: a folder in its bucket: `s3://bucket/run`.
        environment: variables with which s3fs or gcsfs in any other process reach it.

    Faults take `method` (`"PUT|POST"`), `key` (a pattern, `"run/*/COMPLETE"`), `skip`, `times`, `probability` and `seed`:
    see `faults.Fault`. Each request has the first that is due.
    """

    def __init__(self, kind: str, port: int) -> None:
        self.kind, self.port = kind, port
        self.url = self.at("run")
        address = f"http://127.0.0.1:{port}"
        if kind == "s3":
            self.environment = {
                "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            }  # fmt: skip
        else:
            # Without the last one gcsfs asks by gRPC what kind of bucket it is, for a minute.
            self.environment = {
                "STORAGE_EMULATOR_HOST": address, "FSSPEC_GS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            }  # fmt: skip
        self.environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def at(self, prefix: str) -> str:
        """Return the URL of another folder in the same bucket."""
        return f"{self.kind}://{_BUCKET}/{prefix}"

    @contextlib.contextmanager
    def reached_from_here(self) -> Iterator[None]:
        """Let this process use the server through fsspec. It must not fork afterwards: their threads would be missing."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        fsspec.config.set_conf_env(fsspec.config.conf)  # read once, at the first import
        system = _file_system(self.kind)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name)
                else:
                    os.environ[name] = value
            fsspec.config.conf.pop("gs", None)
            system.clear_instance_cache()

    # Faults -----------------------------------------------------------------------------------------------------------

    def fail(self, status: int, **which: Any) -> None:
        """Answer with an error, and do nothing."""
        self._fault(faults.STATUS, status, which)

    def cut(self, **which: Any) -> None:
        """End the connection in the middle of what is uploaded, or of the answer if nothing is."""
        self._fault(faults.CUT, 0, which)

    def lose(self, **which: Any) -> None:
        """Do what is asked, and end the connection without an answer."""
        self._fault(faults.LOST, 0, which)

    def slow(self, bytes_per_second: float, **which: Any) -> None:
        """Read and write bodies slowly, each connection for itself."""
        self._fault(faults.SLOW, bytes_per_second, which)

    def wait(self, seconds: float, **which: Any) -> None:
        self._fault(faults.WAIT, seconds, which)

    def kill(self, pid: int, before: bool = True, **which: Any) -> None:
        """SIGKILL a process when the request arrives, before it is carried out or after; once, unless `times` says else."""
        self._fault(faults.KILL_BEFORE if before else faults.KILL_AFTER, pid, {"times": 1} | which)

    def clear(self, key: str = "") -> None:
        """Take back all faults, or those of one pattern of keys; not the settings."""
        self._ask("DELETE", "faults", {"key": key})

    def faults_left(self) -> list[dict[str, Any]]:
        return self._ask("GET", "faults")

    def expire_credentials(self) -> None:
        """Refuse everybody, until they are renewed."""
        self._ask("POST", "settings", {"expired": True})

    def renew_credentials(self) -> None:
        self._ask("POST", "settings", {"expired": False})

    def list_late(self, seconds: float) -> None:
        """Let lists show new objects only after so long. Asked for by name, they are there at once."""
        self._ask("POST", "settings", {"lists_late": seconds})

    def set_clock(self, seconds: float) -> None:
        """Set the server's clock: so much ahead of this machine's, or behind it if negative."""
        self._ask("POST", "settings", {"skew": seconds})

    # What is there ----------------------------------------------------------------------------------------------------

    def requests(self) -> list[Request]:
        return [Request(**line) for line in self._ask("GET", "requests")]

    def objects(self, prefix: str = "") -> dict[str, int]:
        """Return the sizes in bytes of the objects, by name in the bucket."""
        return {name: size for name, (size, _) in self._ask("GET", "objects").items() if name.startswith(prefix)}

    def times(self) -> dict[str, float]:
        """Return when they were written, in seconds since 1970 by the server's clock."""
        return {name: when for name, (_, when) in self._ask("GET", "objects").items()}

    def read(self, name: str) -> bytes | None:
        content = self._ask("GET", f"objects/{quote(name)}")
        return None if content is None else base64.b64decode(content)

    def remove(self, prefix: str) -> None:
        """Delete the objects whose names begin so, whatever the faults are."""
        for name in self.objects(prefix):
            self._ask("DELETE", f"objects/{quote(name)}")

    def snapshot(self, prefix: str = "") -> dict[str, bytes]:
        """Return the content of the objects, by name in the bucket."""
        return {name: self.read(name) or b"" for name in self.objects(prefix)}

    def _fault(self, kind: str, value: float, which: dict[str, Any]) -> None:
        self._ask("POST", "faults", {"kind": kind, "value": value} | which)

    def _ask(self, method: str, name: str, sent: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, f"/-/{name}", json.dumps(sent or {}))
            answer = connection.getresponse()
            assert answer.status == 200, answer.status
            return json.loads(answer.read())
        finally:
            connection.close()


@contextlib.contextmanager
def object_server(kind: str = "s3") -> Iterator[ObjectServer]:
    """Run a server with an empty bucket: `s3` or `gs`."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.object_server", kind, _BUCKET], cwd=_ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env=environment | {"PYTHONPATH": str(_ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "the object server has not started"
        yield ObjectServer(kind, int(port))
    finally:
        process.terminate()
        process.communicate()


def _file_system(kind: str) -> Any:
    """Return the class of fsspec for the server, without what it remembers of other tests' servers."""
    if kind == "gs":
        import gcsfs.core

        # As GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false says, which it reads when it is first imported.
        fsspec.register_implementation("gs", gcsfs.core.GCSFileSystem, clobber=True)
    system = fsspec.get_filesystem_class(kind)
    system.clear_instance_cache()
    return system
