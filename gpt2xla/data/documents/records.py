"""Whole records of files of JSON lines, JSON, parquet or Arrow, each with its place for messages."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2xla.data.documents import compression, json_lines, tables
from gpt2xla.data.documents.json_values import Values
from gpt2xla.data.documents.reading_options import COMPRESSIONS, Reading
from gpt2xla.data.documents.recognition import recognise
from gpt2xla.errors import InputError

_SUFFIXES = (".parquet", ".arrow", ".feather", ".jsonl", ".ndjson", ".json")
RECORD_SUFFIXES = tuple(suffix + packed for suffix in _SUFFIXES for packed in ("", *COMPRESSIONS))


def read_records(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Yield each record with its place: "name, line 3" of JSON lines, "name, record 3" of others, from 1. Raises InputError
    if the file holds no records or cannot be read."""
    content = recognise(file, name, Reading())
    with compression.readable(name):
        if content.format == "parquet":
            yield from _rows(tables.read_parquet(file, name, None), name)
        elif content.format == "arrow":
            yield from _rows(tables.read_arrow(file, content.layers, name, None), name)
        elif content.format == "jsonl":
            with compression.opened(file, content.layers) as source:
                for number, value in json_lines.read_values(source, name):
                    yield f"{name}, line {number}", value
        elif content.format == "json":
            with (
                compression.opened(file, content.layers) as source,
                io.TextIOWrapper(source, encoding="utf-8-sig", newline="") as text,
            ):
                for number, value in enumerate(Values(text, name), 1):
                    yield f"{name}, record {number}", value
        else:
            raise InputError(f"{name} holds {content.format}, not records; give JSON lines, JSON, parquet or Arrow")


def _rows(arrays: Iterator[Any], name: str) -> Iterator[tuple[str, Any]]:
    number = 0
    for array in arrays:
        array.validate(full=True)  # Arrow trusts a file's offsets and its UTF-8
        for value in array.to_pylist():
            number += 1
            yield f"{name}, record {number}", value
