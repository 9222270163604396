"""Documents in a column of CSV and TSV files, which begin with a header. Quoting is strict: what is uncertain is refused."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator

import pyarrow as pa

from gpt2xla.data.documents.reading import LONGEST
from gpt2xla.errors import InputError

CSV_DELIMITERS = ",;|\t"
TSV_DELIMITERS = "\t"
_BLOCK_CHARACTERS = 1 << 20


def read(source: pa.NativeFile, name: str, column: str, delimiters: str) -> Iterator[pa.Array]:
    """Yield the texts in `column`, in arrays of a few MB.

    The delimiter is the first of `delimiters` that makes `column` a name in the header.

    Raises:
        InputError: there is no such column, a row has another length, or quotes or bytes are wrong. It names the line.
    """
    csv.field_size_limit(LONGEST)
    with io.TextIOWrapper(source, encoding="utf-8-sig", newline="") as text:
        lines = _lines(text, name)
        first = next(lines, "")
        if not first.strip():
            return
        delimiter = _delimiter(first, column, delimiters, name)
        rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        try:
            header = next(rows)
            if header.count(column) != 1:
                raise InputError(
                    f"{name}: its header names {column!r} {header.count(column)} times; give each its own name"
                )
            yield from _texts(rows, len(header), header.index(column), name)
        except csv.Error as error:
            raise InputError(f"{name}, line {rows.line_num}: {error}; fix it, or convert it to JSON lines") from None


def _texts(rows: Iterator[list[str]], columns: int, place: int, name: str) -> Iterator[pa.Array]:
    held: list[str] = []
    size = 0
    for row in rows:
        if not row:  # a blank line
            continue
        if len(row) != columns:
            number = rows.line_num  # type: ignore[attr-defined]
            raise InputError(
                f"{name}, line {number}: {len(row)} columns, but the header has {columns}; fix or remove it"
            )
        held.append(row[place])
        size += len(row[place])
        if size >= _BLOCK_CHARACTERS or len(held) >= _BLOCK_CHARACTERS:
            yield pa.array(held, pa.large_string())
            held, size = [], 0
    yield pa.array(held, pa.large_string())


def _lines(text: io.TextIOWrapper, name: str) -> Iterator[str]:
    number = 0
    try:
        while line := text.readline(LONGEST):
            number += 1
            if len(line) == LONGEST or "\0" in line:
                what = "is too long" if len(line) == LONGEST else "holds NUL bytes"
                raise InputError(f"{name}, line {number}, {what}; fix or remove it")
            yield line
    except UnicodeDecodeError:
        raise InputError(f"{name} holds bytes that are not UTF-8; save it as UTF-8") from None


def _delimiter(header: str, column: str, delimiters: str, name: str) -> str:
    names: dict[str, list[str]] = {
        delimiter: next(csv.reader([header], delimiter=delimiter)) for delimiter in delimiters
    }
    for delimiter, columns in names.items():
        if column in columns:
            return delimiter
    most: list[str] = max(names.values(), key=len)
    held = ", ".join(most)[:300]
    raise InputError(
        f"{name}: no column {column!r}; its first line, the header, holds {held}; choose with --text-column"
    )
