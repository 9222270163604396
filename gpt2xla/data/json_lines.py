"""Documents in files of JSON lines. Arrow reads them; what it cannot read is looked at again, to say which line it is."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.json

from gpt2xla.errors import InputError

_LONGEST_LINE = 16 << 20


def read(file: Path, name: str, column: str) -> Iterator[pa.Array]:
    """The texts in the field `column`, in arrays of a few MB. Raises InputError: no line has it, or one cannot be read."""
    options = pyarrow.json.ParseOptions(
        explicit_schema=pa.schema([(column, pa.string())]), unexpected_field_behavior="ignore"
    )
    size = pyarrow.json.ReadOptions(block_size=_LONGEST_LINE)
    try:
        with pa.input_stream(str(file)) as source:
            for batch in pyarrow.json.open_json(source, read_options=size, parse_options=options):
                if batch.num_rows and batch.column(0).null_count == batch.num_rows:
                    raise InputError(_without_field(file, name, column))
                yield batch.column(0)
    except pa.ArrowInvalid:
        if found := _first_bad_line(file, column):
            raise InputError(f"{name}, line {found}") from None
        raise


def _without_field(file: Path, name: str, column: str) -> str:
    fields = next((values for line in _lines(file) if (values := _object_in(line))), {})
    texts = ", ".join(field for field, value in fields.items() if isinstance(value, str) and field != column)
    held = f"no text in the field {column!r} of its lines, which hold {', '.join(fields) or 'nothing'}"
    return f"{name}: {held}; " + (f"text is in {texts}; choose with --text-column" if texts else "no field holds text")


def _object_in(line: bytes) -> dict | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _first_bad_line(file: Path, column: str) -> str | None:
    """Its number, what is wrong with it, and the mend."""
    longest, longest_number = 0, 0
    for number, line in enumerate(_lines(file), 1):
        if len(line) > longest:
            longest, longest_number = len(line), number
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "bytes that are not UTF-8"
            return f"{number}, is not JSON ({reason}); mend or remove it"
        if not isinstance(values, dict):
            return f'{number}, is JSON, but no object such as {{"{column}": "..."}}; mend or remove it'
        value = values.get(column)
        if value is not None and not isinstance(value, str):
            texts = ", ".join(field for field, other in values.items() if isinstance(other, str))
            kind = {dict: "an object", list: "a list", bool: "true or false"}.get(type(value), "a number")
            mend = f"text is in {texts}; choose with --text-column" if texts else "no field holds text"
            return f"{number}: the field {column!r} holds {kind}, not text; {mend}"
    if longest > _LONGEST_LINE:
        return (
            f"{longest_number}, is of {longest >> 20} MiB, and {_LONGEST_LINE >> 20} can be read; divide or remove it"
        )
    return None


def _lines(file: Path) -> Iterator[bytes]:
    with pa.input_stream(str(file)) as source, io.BufferedReader(source, 1 << 20) as lines:
        yield from lines
