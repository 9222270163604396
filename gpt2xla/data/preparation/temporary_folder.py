"""A folder for files that only pass through. The next process that makes one removes what a killed process left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "gpt2xla-hub-"


@contextlib.contextmanager
def temporary_folder(parent: str | None) -> Iterator[Path]:
    """Make a folder in `parent` (default: that of temporary files), which is removed at the end. Raises OSError."""
    all_folders = Path(parent or tempfile.gettempdir())
    for left_over in all_folders.glob(f"{_PREFIX}*/"):
        with contextlib.suppress(OSError):  # in use, another user's, or on a disk without locks
            lock = _lock(left_over)
            shutil.rmtree(left_over, ignore_errors=True)
            os.close(lock)
    folder, lock = _make(all_folders)
    try:
        yield folder
    finally:
        for _ in range(10):  # a download that nobody waits for any more may still write into it
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
        os.close(lock)


def _make(parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        # Before it is locked, another process may take it for a leftover and remove it.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            lock = _lock(folder)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _lock(folder: Path) -> int:
    """Lock the folder until the returned descriptor is closed, or the process ends in any way."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
