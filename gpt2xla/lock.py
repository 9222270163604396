"""A folder for one process alone."""

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

_NOT_SUPPORTED = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)  # as some network file systems say


@contextlib.contextmanager
def alone(file: Path, what: str) -> Iterator[None]:
    """Hold the lock `file`, in which host and process stand for others to read. A dead process's lock is nobody's.

    Raises:
        InputError: another process holds it; the message begins with `what`, the flag and the folder.
    """
    with file.open("a+", encoding="utf-8") as lock:
        _lock(lock, fcntl.LOCK_EX, what)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


def refuse_if_taken(file: Path, what: str) -> None:
    """Raise what `alone` would, for another process's lock, without taking it: as many may ask at once as like."""
    if file.exists():
        with file.open(encoding="utf-8") as lock:
            _lock(lock, fcntl.LOCK_SH, what)


def _lock(lock: TextIO, kind: int, what: str) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise InputError(f"{what}: {holder} is at work there; wait for it or stop it, or choose another") from None
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
