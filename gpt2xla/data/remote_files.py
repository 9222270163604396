"""Single files behind URLs (`gs://`, `https://`, whatever fsspec knows), which are fetched while they are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpt2xla.errors import InputError, RunFailed, in_one_line
from gpt2xla.processes.exits import is_disk_full
from gpt2xla.storage import RETRY_WAITS, download, opened, version_of, with_retries


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL.

    Attributes:
        size: in bytes; 0 if its storage does not tell.
        version: changes with its content, as far as its storage tells.
    """

    url: str
    size: int
    version: str


def find_remote(url: str, option: str, suffixes: tuple[str, ...]) -> list[RemoteFile]:
    """Return the file at a URL, those that a pattern such as gs://bucket/*.ndjson matches, or those of a folder that end in
    one of `suffixes`, by name. Raises InputError, which names `option`, if there are none, or they cannot be listed."""
    files, path = opened(url, option)

    def listed() -> dict[str, Any]:
        if any(character in path for character in "*?["):
            return files.glob(path, detail=True)
        info = files.info(path)
        if info.get("type") != "directory":
            return {path: info}
        found = files.find(path, maxdepth=1, detail=True)
        return {name: info for name, info in found.items() if name.lower().endswith(suffixes)}

    try:
        found = with_retries(listed, url)
    except FileNotFoundError:
        found = {}
    except Exception as error:  # each storage has its own errors, also for credentials
        fix = "check address and credentials"
        raise InputError(
            f"{option} {url} cannot be read: {type(error).__name__}: {in_one_line(error)}; {fix}"
        ) from None
    found = {name: info for name, info in found.items() if info.get("type") != "directory"}
    if not found:
        raise InputError(f"{option} {url}: no such file there; check the address")
    return [
        RemoteFile(files.unstrip_protocol(name), info.get("size") or 0, version_of(files, name, info))
        for name, info in sorted(found.items())
    ]


@contextlib.contextmanager
def fetched(file: RemoteFile, option: str, folder: Path) -> Iterator[Path]:
    """Have the file in `folder`, which is made. It is removed after it was read. Raises InputError if it is not there any
    more, and RunFailed if it could not be fetched."""
    files, path = opened(file.url, option)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "file"
    try:
        with_retries(partial(download, files, path, target), file.url)
    except FileNotFoundError:
        raise InputError(f"{option} {file.url}: no such file there any more; check the address") from None
    except OSError as error:
        if is_disk_full(error):
            raise
        tries = len(RETRY_WAITS) + 1
        raise RunFailed(f"{file.url} could not be fetched in {tries} tries: {in_one_line(error)}") from None
    yield target
    target.unlink()
