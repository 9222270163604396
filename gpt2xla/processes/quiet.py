"""Keeps what libraries print about themselves out of a run's output. Their errors come through."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator


def hide_remarks() -> None:
    """Hide messages that mean nothing to the user. Every program calls it once, through `exit_code`."""
    # torch.compile says it on every machine that has nvcc but no GPU.
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime" not in record.getMessage()
    )
    # Clients of object stores print the traceback of each error that they also raise, and that the user gets in one line.
    for library in ("gcsfs", "s3fs"):
        logging.getLogger(library).addHandler(logging.NullHandler())


@contextlib.contextmanager
def silent(*numbers: int) -> Iterator[Callable[[str], object]]:
    """Silence these file descriptors, also for C++: 1 is standard output, 2 standard error. Give a function that still
    prints, to the last of them. Gloo greets each process on 1, and torch prints C++ stack frames at each try on 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(number) for number in numbers]
    with open(os.devnull, "wb") as nowhere:
        for number in numbers:
            os.dup2(nowhere.fileno(), number)
    try:
        yield lambda text: os.write(kept[-1], f"{text}\n".encode())
    finally:
        for number, copy in zip(numbers, kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
