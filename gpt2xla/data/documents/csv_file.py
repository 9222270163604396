"""Documents in a column of CSV and TSV files, which begin with a header. Quoting is strict: what is uncertain is refused."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator

import pyarrow as pa

from gpt2xla.data.documents.reading_options import LONGEST, Format
from gpt2xla.errors import InputError

_DELIMITERS = {"csv": ",;|\t", "tsv": "\t"}


def read(source: pa.NativeFile, name: str, column: str, format: Format) -> Iterator[str]:
    """Yield the texts in `column`. The delimiter is the first one that makes `column` a name in the header.

    Raises InputError, naming the line, if there is no such column, a row has another length, or quotes or bytes are wrong.
    """
    csv.field_size_limit(LONGEST)
    with io.TextIOWrapper(source, encoding="utf-8-sig", newline="") as text:
        lines = _lines(text, name)
        first = next(lines, "")
        if not first.strip():
            return
        delimiter = _delimiter(first, column, _DELIMITERS[format], name)
        rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        try:
            header = next(rows)
            if (times := header.count(column)) != 1:
                raise InputError(f"{name}: its header names {column!r} {times} times; give each its own name")
            for row in filter(None, rows):  # without blank lines
                if len(row) != len(header):
                    wrong = f"{len(row)} columns, but the header has {len(header)}"
                    raise InputError(f"{name}, line {rows.line_num}: {wrong}; fix or remove it")
                yield row[header.index(column)]
        except csv.Error as error:
            raise InputError(f"{name}, line {rows.line_num}: {error}; fix it, or convert it to JSON lines") from None


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
    most: list[str] = []
    for delimiter in delimiters:
        columns = next(csv.reader([header], delimiter=delimiter))
        if column in columns:
            return delimiter
        most = max(most, columns, key=len)
    held = ", ".join(most)[:300]
    raise InputError(f"{name}: no column {column!r}; its first line, the header, has {held}; choose with --text-column")
