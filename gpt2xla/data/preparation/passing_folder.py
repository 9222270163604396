"""A folder for files that pass through. If its process is killed, the next one that makes such a folder removes it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "gpt2xla-hub-"


def make(parent: str | None) -> Path:
    """A new folder in `parent` (default: that of temporary files), this process's own until it ends. Raises OSError."""
    folder_of_all = Path(parent or tempfile.gettempdir())
    for left_over in folder_of_all.glob(f"{_PREFIX}*"):
        _remove_if_left_over(left_over)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder_of_all))
        # Another process may take it for left over before it is locked, and remove it.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            _lock(folder)
            if folder.exists():
                return folder


def _remove_if_left_over(folder: Path) -> None:
    try:
        lock = _lock(folder)
    except OSError:  # in use, another user's, or on a disk that knows no locks
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _lock(folder: Path) -> int:
    """Held until the descriptor is closed, or the process ends in whatever way."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
