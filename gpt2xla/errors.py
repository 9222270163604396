"""Errors whose message is for the user: one line, no traceback."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator


class InputError(ValueError):
    """What the user gave cannot work; the message names the flag or file and the fix. Exit code 2."""


class RunFailed(RuntimeError):
    """The run cannot go on, through no fault of the program; the message says why and what to do. Exit code 1."""


# What torch says, C++ says, and oneDNN says when it cannot have its scratch memory.
_NO_MEMORY = ("can't allocate memory", "std::bad_alloc", "could not create a primitive", "could not create a memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory has run out: this machine's, or a device's by torch's own error."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


@contextlib.contextmanager
def blaming(what: str) -> Iterator[None]:
    """An operating system's error inside is the user's to fix: an InputError that names the flag or file `what`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: {error.strerror or error}; fix it, or choose another") from None
