"""Looks up the newest numbers in a run's metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def newest_line(file: Path, key: str, until: float = math.inf) -> dict[str, Any] | None:
    """Return the newest line that has `key`, at a step of at most `until`; None if there is no such line, or no file."""
    return next(newest_lines(file, key, until), None)


def newest_lines(file: Path, key: str, until: float = math.inf) -> Iterator[dict[str, Any]]:
    """Yield all such lines, the newest first."""
    try:
        texts = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for text in reversed(texts):
        if f'"{key}"' in text:
            try:
                line = json.loads(text)
                is_one = line["step"] <= until and line[key] is not None
            except (ValueError, KeyError, TypeError):
                continue  # a line that a crash cut short
            if is_one:
                yield line
