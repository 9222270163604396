"""Errors whose message is for the user: one line, no traceback."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator


class InputError(ValueError):
    """What the user gave cannot work; the message names the flag or file and the mend. Exit code 2."""


class RunFailed(RuntimeError):
    """The run cannot go on, through no fault of the program; the message says why and what to do. Exit code 1."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory has run out: this machine's, or a device's by torch's own error."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(w in str(error) for w in ("can't allocate memory", "std::bad_alloc"))


@contextlib.contextmanager
def blaming(what: str) -> Iterator[None]:
    """An operating system's error inside is the user's to mend: an InputError that names the flag or file `what`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: {error.strerror or error}; choose another or mend it") from None
