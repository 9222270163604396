"""Looks up the newest numbers in a run's metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 16


def newest_line(file: Path, key: str, until: float = math.inf) -> dict[str, Any] | None:
    """Return the newest line that has `key`, at a step of at most `until`; None if there is no such line, or no file."""
    return next(newest_lines(file, key, until), None)


def newest_lines(file: Path, key: str, until: float = math.inf) -> Iterator[dict[str, Any]]:
    """Yield all such lines, the newest first.

    The file is read from its end, only as far as is asked for: each save looks something up, and to read all of a long run
    each time would make its memory grow with its steps."""
    wanted = f'"{key}"'.encode()
    for text in _lines_from_the_end(file):
        if wanted in text:
            try:
                line = json.loads(text)
                is_one = line["step"] <= until and line[key] is not None
            except (ValueError, KeyError, TypeError):
                continue  # a line that a crash cut short
            if is_one:
                yield line


def _lines_from_the_end(file: Path) -> Iterator[bytes]:
    with contextlib.suppress(OSError), file.open("rb") as stream:
        start, cut = stream.seek(0, os.SEEK_END), b""  # `cut` begins before `start`
        while start:
            end, start = start, max(0, start - _BLOCK_BYTES)
            stream.seek(start)
            cut, *lines = (stream.read(end - start) + cut).split(b"\n")
            yield from reversed(lines)
        yield cut
