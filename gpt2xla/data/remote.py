"""Token shards behind a URL (`gs://`, `s3://`, `hf://datasets/...`, whatever fsspec knows), read through a folder on disk.

A shard is fetched when it is first read, and the next one in a thread meanwhile. Files appear under their names only when
they are whole. A lock per shard lets one of several processes on a host fetch it while the others wait. A killed process
leaves neither a damaged shard nor a lock.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2xla.config.paths import PREPARE
from gpt2xla.data.shard_files.mask_file import MASK_SUFFIX
from gpt2xla.data.shard_files.shard_format import SUFFIXES
from gpt2xla.errors import InputError, RunFailed, user_error
from gpt2xla.files import folder_name, write_whole
from gpt2xla.processes.locks import in_turn
from gpt2xla.storage import RETRY_WAITS, download, in_words, opened, with_retries

# Fetched together with the manifest, as far as they exist.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Cache:
    """Where fetched files are kept. Beyond `limit` bytes the shards longest unread are removed; 0 means no limit."""

    folder: Path
    limit: int = 0


DEFAULT_CACHE = Cache(Path("~/.cache/gpt2xla/data"))


class RemoteFolder:
    """A folder behind a URL. Raises InputError if it cannot be read, or has no manifest.

    Attributes:
        folder: where its files appear on this machine. Each manifest at a URL has its own folder.
    """

    def __init__(self, url: str, option: str, cache: Cache, manifest: str) -> None:
        self.url, self.option, self.cache = url.rstrip("/"), option, cache
        self._files, self._path = opened(self.url, option)
        text = self._read_small(manifest)
        if text is None:
            fix = f"make it with {PREPARE}, or copy the shards here"
            raise InputError(f"{option} {url} has no {manifest}, without which a remote folder cannot be read; {fix}")
        root = cache.folder.expanduser()
        self.folder = root / folder_name(self.url, text)
        with user_error(f"--data-cache {root}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / manifest, text)
            for file in TOKENIZER_FILES:
                if (text := self._read_small(file)) is not None:
                    write_whole(self.folder / file, text)
        self._ahead: threading.Thread | None = None

    @contextlib.contextmanager
    def at_hand(self, file: str, sha256: str) -> Iterator[Path]:
        """Have the shard on this machine, fetched if it is missing. No process removes it inside the block, and what is
        mapped there can be read afterwards in any case. Raises InputError if the shard is missing at the URL, or is not what
        the manifest says, and RunFailed if it could not be fetched."""
        shard = self.folder / file
        with in_turn(_lock_file(shard)):
            if not shard.exists():
                self._fetch(file, sha256)
            os.utime(shard)  # access times are often switched off
            yield shard
        self._make_room(keep=shard)

    def fetch_ahead(self, file: str, sha256: str) -> None:
        """Begin to fetch the shard in a thread, unless it is here or the thread is still busy with another one."""
        if (self.folder / file).exists() or (self._ahead and self._ahead.is_alive()):
            return

        def fetch() -> None:
            with contextlib.suppress(Exception), self.at_hand(file, sha256):  # reading the shard reports errors
                pass

        # A daemon thread: the end of a run does not wait for data that it will not read.
        self._ahead = threading.Thread(target=fetch, daemon=True, name="fetch-ahead")
        self._ahead.start()

    def _read_small(self, file: str) -> bytes | None:
        """Return the file's bytes, or None if there is no such file."""
        try:
            return with_retries(lambda: self._files.cat_file(f"{self._path}/{file}"), f"{self.url}/{file}")
        except FileNotFoundError:
            return None
        except Exception as error:  # as above
            what = f"{self.option} {self.url}/{file} cannot be read"
            raise InputError(f"{what}: {in_words(error)}; check address and credentials") from None

    def _fetch(self, file: str, sha256: str) -> None:
        partial = self.folder / f".{file}.partial"
        try:
            found = with_retries(lambda: download(self._files, f"{self._path}/{file}", partial), f"{self.url}/{file}")
        except FileNotFoundError:
            raise InputError(f"{self.url}/{file} is missing although its manifest names it; upload it again") from None
        except OSError as error:
            tries = len(RETRY_WAITS) + 1
            raise RunFailed(f"{self.url}/{file} could not be fetched in {tries} tries: {in_words(error)}") from None
        if found != sha256:
            partial.unlink()
            raise InputError(f"{self.url}/{file} is not what its manifest says (sha256 differs); upload it again")
        os.rename(partial, self.folder / file)

    def _make_room(self, keep: Path) -> None:
        """Remove the shards longest unread, except `keep`, until the rest fits the limit."""
        if not self.cache.limit:
            return
        found = []
        for file in self.cache.folder.expanduser().glob("*/[!.]*"):
            with contextlib.suppress(FileNotFoundError):  # another process may remove it
                if file.suffix in (*SUFFIXES, MASK_SUFFIX):
                    found.append((file.stat().st_mtime, file.stat().st_size, file))
        total = sum(size for _, size, _ in found)
        for _, size, file in sorted(found):
            if total <= self.cache.limit:
                return
            if file != keep:
                with in_turn(_lock_file(file)):  # not between another process's fetching and opening it
                    file.unlink(missing_ok=True)
                total -= size


def _lock_file(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.lock")
