"""Errors whose message is for the user: one line, no traceback; and the words that messages share."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator


class InputError(ValueError):
    """The user's input is wrong. The message names the flag or file and the fix. Exit code 2."""


class RunFailed(RuntimeError):
    """The run cannot continue, and the program is not at fault. The message says why and what to do. Exit code 1."""


# Messages of torch, C++, and oneDNN when it gets no scratch memory.
_NO_MEMORY = ("can't allocate memory", "std::bad_alloc", "could not create a primitive", "could not create a memory")

_NAMES: dict[str, str] = {}  # of copies, by their paths


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` means that this machine's or a device's memory has run out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


@contextlib.contextmanager
def user_error(what: str) -> Iterator[None]:
    """Turn an OSError inside the block into an InputError that names `what`, the flag or file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: {error.strerror or error}; fix it, or choose another") from None


def in_one_line(error: BaseException, limit: int = 300) -> str:
    """Return the first line of the error's message, or the name of its class if there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def name_copy(copy: object, name: str) -> None:
    """Have `as_named` call a file or folder `name`: it is a copy that we made of what a user names so, such as a URL."""
    _NAMES[str(copy)] = name


def as_named(text: object) -> str:
    """Return a path, or a message with paths in it, with the user's names in place of those of our copies."""
    named = str(text)
    for copy in sorted(_NAMES, key=len, reverse=True):  # a folder after what is in it
        named = named.replace(copy, _NAMES[copy])
    return named


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return "1 shard", "2 shards", "1,000 shards". `plural` is needed where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
