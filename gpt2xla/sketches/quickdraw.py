"""Reads drawings from ndjson as Quick, Draw! publishes them: https://github.com/googlecreativelab/quickdraw-dataset.

A stroke of the raw form holds three lists (x, y, time), one of the simplified form two, x and y from 0 to 255. Arrow reads a
block of lines; where it fails, or a record is not as it should be, the block is read again to name the line.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from gpt2xla.data.documents.json_lines import has_half_character, value_of
from gpt2xla.errors import InputError
from gpt2xla.sketches.strokes import Drawings

_STROKES = pa.list_(pa.list_(pa.list_(pa.float64())))
_SCHEMA = pa.schema(
    {"word": pa.string(), "recognized": pa.bool_(), "key_id": pa.string(), "drawing": _STROKES}
)  # what else a record holds is not read
_PARSE = pyarrow.json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore")


class Lines(NamedTuple):
    """Some whole lines of a file, and the number of the first one, from 1."""

    text: bytes
    first: int
    name: str


class Records(NamedTuple):
    """What N lines hold.

    Attributes:
        words: the different words.
        word: (N,), which of them each drawing is of.
        recognized: (N,), bool: whether the game recognised it. False where that is not stated.
        keys: (N,), uint64: a hash of each drawing's key_id, or of word and strokes where it has none.
        drawings: some may be without strokes. Their points are what the file holds, also NaN.
    """

    words: list[str]
    word: np.ndarray
    recognized: np.ndarray
    keys: np.ndarray
    drawings: Drawings

    def only(self, chosen: np.ndarray) -> Records:
        """Return the records that are `chosen`, (N,) of bool."""
        if chosen.all():
            return self
        drawings = self.drawings.only(chosen)
        return Records(self.words, self.word[chosen], self.recognized[chosen], self.keys[chosen], drawings)


def read(lines: Lines, seed: int) -> Records:
    """Return what the lines hold, but blank ones. `seed` decides the keys. Raises InputError that names the first line that
    is not a drawing."""
    table = _parsed(lines)
    words, keys = table["word"].combine_chunks().dictionary_encode(), table["key_id"].to_pylist()
    if not all(keys):
        drawn = zip(keys, table["word"].to_pylist(), table["drawing"], strict=True)
        keys = [key or f"{word} {drawing.as_py()}" for key, word, drawing in drawn]
    salt = hashlib.blake2b(str(seed).encode()).digest()
    hashes = [hashlib.blake2b(key.encode(), digest_size=8, key=salt).digest() for key in keys]
    return Records(
        words.dictionary.to_pylist(),
        words.indices.to_numpy(),
        pc.fill_null(table["recognized"], False).to_numpy(),
        np.frombuffer(b"".join(hashes), dtype="<u8"),
        _drawings(table["drawing"].combine_chunks()),
    )


def _parsed(lines: Lines) -> pa.Table:
    if b"{" in lines.text:  # Arrow crashes on a block of nothing but null
        whole = pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines.text) + 1)
        try:
            table = pyarrow.json.read_json(pa.BufferReader(lines.text), whole, _PARSE)
            table.select(["word", "key_id"]).validate(full=True)  # Arrow trusts a text to be UTF-8
            if _is_sound(table):
                return table
        except pa.ArrowInvalid:
            pass
    values = []
    for number, line in enumerate(lines.text.split(b"\n"), lines.first):
        if line.strip():
            where = f"{lines.name}, line {number}"
            values.append(_checked(value_of(line, where), where))
    return pa.Table.from_pylist(values, _SCHEMA)


def _is_sound(table: pa.Table) -> bool:
    """Tell whether every record has a word, and strokes of two or three lists of equally many numbers."""
    drawings = table["drawing"].combine_chunks()
    strokes = drawings.flatten()
    lists = strokes.flatten()
    if table["word"].null_count or any(array.null_count for array in (drawings, strokes, lists, lists.flatten())):
        return False
    counts, lengths = strokes.value_lengths().to_numpy(), lists.value_lengths().to_numpy()
    if not ((counts == 2) | (counts == 3)).all():
        return False
    same = lengths[1:] == lengths[:-1]
    same[np.cumsum(counts)[:-1] - 1] = True  # the next one is another stroke's
    return bool(same.all())


def _checked(record: Any, where: str) -> dict[str, Any]:
    """Return what is read of a record. Raises InputError if it is not a drawing."""
    match record:
        case {"word": str(word), "drawing": [*strokes]}:
            pass
        case _:
            form = '{"word": "apple", "drawing": [[[x, ...], [y, ...]], ...]}'
            raise InputError(f"{where}, is JSON, but not a drawing such as {form}; fix or remove it")
    key = record.get("key_id")
    key = None if key is None else str(key)
    if has_half_character([word, key]):
        raise InputError(f"{where}, holds half a character (\\ud800 to \\udfff, alone); fix or remove it")
    for number, stroke in enumerate(strokes, 1):
        if not _is_stroke(stroke):
            what = "is not two or three lists of equally many numbers (x, y and perhaps time)"
            raise InputError(f"{where}: stroke {number} of its drawing {what}; fix or remove the line")
    numbers = [[[_as_float(value) for value in values] for values in stroke] for stroke in strokes]
    return {"word": word, "recognized": record.get("recognized") is True, "key_id": key, "drawing": numbers}


def _is_stroke(stroke: Any) -> bool:
    return (
        isinstance(stroke, list)
        and len(stroke) in (2, 3)
        and all(isinstance(values, list) and len(values) == len(stroke[0]) for values in stroke)
        and all(type(value) in (int, float) for values in stroke for value in values)
    )


def _as_float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _drawings(column: pa.ListArray) -> Drawings:
    """Return x and y of all points."""
    strokes = column.flatten()
    lists = strokes.flatten()
    values = lists.flatten().to_numpy()
    counts, lengths = strokes.value_lengths().to_numpy(), lists.value_lengths().to_numpy()
    starts, first = np.cumsum(lengths) - lengths, np.cumsum(counts) - counts
    points = lengths[first] if len(first) else lengths
    within = np.arange(points.sum()) - np.repeat(np.cumsum(points) - points, points)
    xy = [values[np.repeat(starts[first + axis], points) + within] for axis in (0, 1)]
    return _without_empty_strokes(np.stack(xy), points, column.value_lengths().to_numpy())


def _without_empty_strokes(points: np.ndarray, strokes: np.ndarray, drawings: np.ndarray) -> Drawings:
    held = np.concatenate([[0], np.cumsum(strokes > 0)])
    ends = np.cumsum(drawings)
    return Drawings(points, strokes[strokes > 0], held[ends] - held[ends - drawings])
