"""File locks: one process at a time in a folder, or at a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from gpt2xla.errors import InputError

_NOT_SUPPORTED = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)  # on some network file systems


@contextlib.contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold the lock `file`, which records our process and host. The lock dies with the process. Raises InputError if another
    process holds it. The message begins with `what`, the flag and the folder."""
    with file.open("a+", encoding="utf-8") as lock:
        _lock(lock, fcntl.LOCK_EX, what)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


def refuse_if_locked(file: Path, what: str) -> None:
    """Raise InputError if another process holds the lock `file`, without taking it. Any number of processes may ask."""
    if file.exists():
        with file.open(encoding="utf-8") as lock:
            _lock(lock, fcntl.LOCK_SH, what)


@contextlib.contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Hold the lock `file`, after waiting for any other process or thread that holds it. Raises OSError on a file system
    without locks."""
    with file.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock(lock: TextIO, kind: int, what: str) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise InputError(f"{what}: in use by {holder}; wait for it, stop it, or use another folder") from None
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
