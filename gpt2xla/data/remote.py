"""Token shards behind a URL (`gs://`, `s3://`, `hf://datasets/...`, whatever fsspec knows), read through a folder on disk.

A shard is fetched when it is first read, and the next one meanwhile in a thread. Files appear under their names only when
they are whole, and a lock file per shard lets one of several processes on a host fetch while the others wait: whenever a
process is killed, what lies there is good, and its locks are gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from gpt2xla.data.shard_files.shard_format import SUFFIXES
from gpt2xla.errors import InputError, RunFailed, user_error

T = TypeVar("T")

# Fetched too where there are some.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
RETRY_WAITS = (1.0, 4.0, 15.0)  # seconds before each further try
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Cache:
    """Where fetched files are kept. Beyond `limit` bytes the shards longest unread are removed; 0 keeps all."""

    folder: Path
    limit: int = 0


DEFAULT_CACHE = Cache(Path("~/.cache/gpt2xla/data"))


def is_url(name: str) -> bool:
    return "://" in name


class RemoteFolder:
    """A folder behind a URL.

    Attributes:
        folder: where its files appear on this machine. Another manifest at the same URL gets another folder.

    Raises:
        InputError: the URL cannot be read, or holds no manifest.
    """

    def __init__(self, url: str, option: str, cache: Cache, manifest: str) -> None:
        self.url, self.option, self.cache = url.rstrip("/"), option, cache
        self._files, self._path = self._connect()
        text = self._read_small(manifest)
        if text is None:
            raise InputError(
                f"{option} {url} has no {manifest}, without which a remote folder cannot be read; make it with "
                "scripts/prepare_text.py, or copy the shards here"
            )
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", self.url)[-80:].strip("-.")
        root = cache.folder.expanduser()
        self.folder = root / f"{name}-{hashlib.sha256(self.url.encode() + text).hexdigest()[:16]}"
        with user_error(f"--data-cache {root}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_whole(self.folder / manifest, text)
            for file in TOKENIZER_FILES:
                if (text := self._read_small(file)) is not None:
                    _write_whole(self.folder / file, text)
        self._in_use: IO[bytes] | None = None
        self._ahead: threading.Thread | None = None

    def use(self, file: str, sha256: str) -> None:
        """Have the shard here; of a limited cache, it is not removed until the next call."""
        with self._locked(file):
            self._fetch_missing(file, sha256)
            if self.cache.limit:
                shard = (self.folder / file).open("rb")
                fcntl.flock(shard, fcntl.LOCK_SH)
                if self._in_use:
                    self._in_use.close()
                self._in_use = shard
        os.utime(self.folder / file)  # access times are often switched off
        self._make_room(keep=self.folder / file)

    def fetch(self, file: str, sha256: str) -> Path:
        """Have the shard here, for now."""
        with self._locked(file):
            self._fetch_missing(file, sha256)
        self._make_room(keep=self.folder / file)
        return self.folder / file

    def fetch_ahead(self, file: str, sha256: str) -> None:
        """Begin to fetch the shard in a thread, unless it still has another one to fetch."""
        if (self.folder / file).exists() or (self._ahead and self._ahead.is_alive()):
            return

        def fetch() -> None:
            with contextlib.suppress(Exception):  # it is met again, and reported, when the shard is read
                self.fetch(file, sha256)

        # A daemon: the end of a run does not wait for data that it will not read.
        self._ahead = threading.Thread(target=fetch, daemon=True, name="fetch-ahead")
        self._ahead.start()

    def _connect(self) -> tuple[Any, str]:
        try:
            return fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            package = getattr(error.__cause__, "name", None) or getattr(error, "name", None) or "fsspec[full]"
            raise InputError(f"{self.option} {self.url} needs another package: pip install {package}") from None
        except Exception as error:  # each storage has errors of its own, credentials' among them
            raise InputError(f"{self.option} {self.url} cannot be opened: {_in_one_line(error)}") from None

    def _read_small(self, file: str) -> bytes | None:
        """The file's bytes, None where there is no such file."""
        try:
            return _with_retries(lambda: self._files.cat_file(f"{self._path}/{file}"))
        except FileNotFoundError:
            return None
        except Exception as error:  # as above
            raise InputError(
                f"{self.option} {self.url}/{file} cannot be read: {_in_one_line(error)}; check address and credentials"
            ) from None

    def _fetch_missing(self, file: str, sha256: str) -> None:
        target = self.folder / file
        if target.exists():
            return
        partial = self.folder / f".{file}.partial"
        try:
            found = _with_retries(lambda: self._download(f"{self._path}/{file}", partial))
        except FileNotFoundError:
            raise InputError(f"{self.url}/{file} is missing although its manifest names it; upload it again") from None
        except OSError as error:
            tries = len(RETRY_WAITS) + 1
            raise RunFailed(f"{self.url}/{file} could not be fetched in {tries} tries: {_in_one_line(error)}") from None
        if found != sha256:
            partial.unlink()
            raise InputError(f"{self.url}/{file} is not what its manifest says (sha256 differs); upload it again")
        os.rename(partial, target)

    def _download(self, source: str, target: Path) -> str:
        """The sha256 of what was written to `target`."""
        digest, size, promised = hashlib.sha256(), 0, self._files.size(source)
        with self._files.open(source, "rb", cache_type="none") as stream, target.open("wb") as out:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        if promised is not None and size != promised:
            raise OSError(f"{size} of {promised} bytes arrived")
        return digest.hexdigest()

    def _make_room(self, keep: Path) -> None:
        if not self.cache.limit:
            return
        shards = [file for file in self.cache.folder.expanduser().glob("*/[!.]*") if file.suffix in SUFFIXES]
        found = []
        for file in shards:
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                found.append((file.stat().st_mtime, file.stat().st_size, file))
        total = sum(size for _, size, _ in found)
        for _, size, file in sorted(found):
            if total <= self.cache.limit:
                return
            if file != keep and _remove_unless_in_use(file):
                total -= size

    def _locked(self, file: str) -> contextlib.AbstractContextManager[bool]:
        return _lock(_lock_file(self.folder / file), wait=True)


def _lock_file(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.lock")


@contextlib.contextmanager
def _lock(file: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock, or without `wait` give False where someone else has it."""
    with file.open("wb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _remove_unless_in_use(file: Path) -> bool:
    with _lock(_lock_file(file), wait=False) as ours:
        if not ours:
            return False
        try:
            with file.open("rb") as shard:
                fcntl.flock(shard, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
        except BlockingIOError:  # someone reads it
            return False
        except FileNotFoundError:
            pass
        return True


def _with_retries(fetch: Callable[[], T]) -> T:
    for wait in RETRY_WAITS:
        try:
            return fetch()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            time.sleep(wait)
    return fetch()


def _write_whole(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.partial")
    partial.write_bytes(content)
    os.replace(partial, file)


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
