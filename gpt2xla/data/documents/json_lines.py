"""Documents in files of JSON lines. Arrow reads them; where it fails, the block is read again to name the line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.json

from gpt2xla.data.documents.reading_options import LONGEST
from gpt2xla.errors import InputError


def read(source: pa.NativeFile, name: str, column: str) -> Iterator[pa.Array]:
    """Yield the texts in the field `column`, null where a line has none, in arrays of a few MB. Raises InputError if none of
    the first lines, 8 MB of them, has the field, or a line cannot be read."""
    schema = pa.schema([(column, pa.string())])
    parse = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    first: dict[str, Any] | None = None  # the fields of the first record, until a text is found
    has_text, size = False, 0
    # Block by block: Arrow's own reading ahead hangs if a stream is damaged.
    for number, block in blocks(source, name):
        try:
            whole = pyarrow.json.ReadOptions(block_size=len(block) + 1)
            texts = pyarrow.json.read_json(pa.BufferReader(block), whole, parse).column(0)
        except pa.ArrowInvalid:
            if found := _first_bad_line(block, number, name, column):
                raise InputError(f"{name}, line {found}") from None
            raise
        has_text = has_text or texts.null_count < len(texts)
        size += len(block)
        if not has_text:
            first = first or _first_fields(block)
            if size > LONGEST // 2:  # the rest may take hours
                break
        yield from texts.chunks
    if first is not None and not has_text:
        raise InputError(without_field(name, column, first))


def read_values(source: pa.NativeFile, name: str) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line that is not blank. Raises InputError if one cannot be read."""
    for first, block in blocks(source, name):
        for number, line in enumerate(block.split(b"\n"), first):
            if line.strip():
                yield number, value_of(line, f"{name}, line {number}")


def without_field(name: str, column: str, fields: dict[str, Any]) -> str:
    """Return the message about records that hold `fields`, and no text in `column`."""
    held = f"no text in the field {column!r} of its records, which hold {', '.join(fields) or 'nothing'}"
    if texts := texts_in(fields):
        return f"{name}: {held}; text is in {texts}; choose with --text-column"
    for field, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f"{name}: {held}; write those in {field!r} one a line, as jq -c '.{field}[]' does"
    return f"{name}: {held}; no field holds text"


def texts_in(fields: dict[str, Any]) -> str:
    return ", ".join(field for field, value in fields.items() if isinstance(value, str))


def not_text(value: Any, fields: dict[str, Any], column: str) -> str:
    """Return the message about a record whose field `column` does not hold text."""
    kind = {dict: "an object", list: "a list", bool: "true or false"}.get(type(value), "a number")
    fix = f"text is in {texts}; choose with --text-column" if (texts := texts_in(fields)) else "no field holds text"
    return f"the field {column!r} holds {kind}, not text; {fix}"


def has_half_character(value: Any) -> bool:
    """Tell whether a text in `value` cannot be written as UTF-8: it holds one surrogate without the other."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def blocks(source: pa.NativeFile, name: str, size: int = LONGEST) -> Iterator[tuple[int, bytes]]:
    """Yield whole lines, not all of them blank, with the number of the first. They are about `size` bytes, or one line.
    Raises InputError if a line is too long."""
    number, held = 1, b""
    while chunk := source.read(size):
        if not held and number == 1:
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
        lines, end, rest = chunk.rpartition(b"\n")
        lines = held + lines if end else b""
        held = rest if end else held + rest
        if lines.strip():
            yield number, lines
        number += lines.count(b"\n") + len(end)
        if len(held) > LONGEST:
            raise _too_long(number, len(held), source, name)
    if held.strip():
        yield number, held


def _too_long(number: int, size: int, source: pa.NativeFile, name: str) -> InputError:
    end = b""
    while not end and (chunk := source.read(LONGEST)):
        line, end, _ = chunk.partition(b"\n")
        size += len(line)
    limit = f"only {LONGEST >> 20} can be read"
    return InputError(f"{name}, line {number}, has {size >> 20} MiB, but {limit}; divide or remove it")


def _first_fields(block: bytes) -> dict[str, Any]:
    for line in block.splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and values:
            return values
    return {}


def value_of(line: bytes, where: str) -> Any:
    """Return what a line holds. Raises InputError, which begins with `where`, if it cannot be read."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        undecoded = isinstance(error, UnicodeDecodeError)
        reason = "bytes that are not UTF-8" if undecoded else getattr(error, "msg", "nested too deeply")
        raise InputError(f"{where}, is not JSON ({reason}); fix or remove it") from None


def _first_bad_line(block: bytes, first: int, name: str, column: str) -> str | None:
    """Return the number of the first bad line, what is wrong with it, and the fix; None if all are good. Raises InputError
    if a line is not JSON."""
    for number, line in enumerate(block.split(b"\n"), first):
        if not line.strip():
            continue
        values = value_of(line, f"{name}, line {number}")
        if values is None:
            continue
        if not isinstance(values, dict):
            return f'{number}, is JSON, but not an object such as {{"{column}": "..."}}; fix or remove it'
        value = values.get(column)
        if value is not None and not isinstance(value, str):
            return f"{number}: {not_text(value, values, column)}"
        if has_half_character(values):
            return f"{number}, holds half a character (\\ud800 to \\udfff, alone); fix or remove it"
    return None
