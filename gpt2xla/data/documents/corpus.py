"""Documents on disk: parts in a fixed order, each a file that can be read again from its beginning.

Texts stay in Arrow arrays of a few MB: no document becomes a Python string on its way to the encoder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from gpt2xla.data.documents import compression, csv_file, input_files, json_lines, json_values, tables, text_file
from gpt2xla.data.documents.reading_options import ALL_SUFFIXES, ENDOFTEXT, Format, Reading, SplitBy
from gpt2xla.data.documents.recognition import Content, promised, recognise
from gpt2xla.errors import InputError, counted, user_error

Split = Literal["train", "test"]

_BLOCK_BYTES = 4 << 20
_ARRAY_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class InputFile:
    """One file to prepare.

    Attributes:
        name, size, how: by which a later preparation recognises it. The size is in bytes; `how` describes its reading.
        opened: a context in which the file is on this machine.
    """

    name: str
    size: int
    opened: Callable[[], AbstractContextManager[Path]]
    how: str


@dataclass(frozen=True)
class Part(InputFile):
    """One file of a corpus.

    Attributes:
        read: yields the documents of the file, in arrays of texts.
        split: the split of its documents; None means that each is drawn.
        say: receives notes about its content.
    """

    read: Callable[[Path], Iterator[pa.Array]]
    split: Split | None = None
    say: Callable[[str], None] = print


class Position(NamedTuple):
    """How much of a corpus has been read: all parts before number `part`, and `documents` of that part."""

    part: int
    documents: int


class Block(NamedTuple):
    """Some documents, the split that they go to, and the position after them."""

    texts: pa.LargeStringArray
    split: Split | None
    after: Position


def blocks(parts: Sequence[Part], start: Position) -> Iterator[Block]:
    """Yield the documents from `start` on, without empty ones, in blocks of about 4 MB. Only the last
    block's position lies past all parts. Raises InputError if a part cannot be read."""
    held: list[pa.Array] = []
    for number, part in enumerate(parts[start.part :], start.part):
        documents = 0
        skipped = start.documents if number == start.part else 0
        if held and part.split != parts[number - 1].split:
            yield Block(pa.concat_arrays(held), parts[number - 1].split, Position(number, 0))
            held = []
        with part.opened() as file:
            for texts in _readable(part, file):
                fresh = texts[max(0, skipped - documents) :]
                if len(fresh) and sum(array.nbytes for array in held) >= _BLOCK_BYTES:
                    yield Block(pa.concat_arrays(held), part.split, Position(number, documents))
                    held = []
                if len(fresh):
                    held.append(fresh)
                documents += len(texts)
    if held:
        yield Block(pa.concat_arrays(held), parts[-1].split, Position(len(parts), 0))


def _readable(part: Part, file: Path) -> Iterator[pa.LargeStringArray]:
    empty = 0
    with compression.readable(part.name):
        for array in part.read(file):
            array.validate(full=True)  # Arrow trusts a file's offsets and its UTF-8
            texts = array.cast(pa.large_string())
            texts = texts.filter(pc.greater(pc.binary_length(texts), 0))
            empty += len(array) - len(texts)
            yield texts
    if empty:
        part.say(f"note: {part.name}: left out {counted(empty, 'record')} without text")


def local_parts(
    paths: Sequence[str | Path],
    *,
    suffixes: tuple[str, ...] = ALL_SUFFIXES,
    exclude: tuple[str, ...] = (),
    column: str = "text",
    split_by: SplitBy = "file",
    format: Format = "auto",
    option: str = "--input",
    say: Callable[[str], None] = print,
) -> list[Part]:
    """Return the parts of files and folders as `input_files.find` finds them.

    `say` receives what was left out, which files are not read as their names say, and which seem to hold several documents.
    Raises InputError if a path does not exist, nothing was found, or the format of a file is not supported.
    """
    files = input_files.find(paths, suffixes, exclude, option, say)
    reading = Reading(column, split_by, format)
    parts, contents = [], {}
    for file in files:
        name = str(file)
        with user_error(f"{option} {name}"):
            size = file.stat().st_size
            contents[name] = content = recognise(file, name, reading)  # now, not an hour into the preparation
        read = partial(_read, name=name, content=content, reading=reading, say=say)
        parts.append(Part(name, size, partial(here, file), _how(content.format, reading), read, say=say))
        if (
            content.note and size < compression.HEAD_BYTES
        ):  # small enough to see now whether all of it is of that format
            with compression.readable(name):
                deque(read(file), maxlen=0)
    _report(contents, reading, say)
    return parts


def here(file: Path) -> AbstractContextManager[Path]:
    """Return the context of a file on this machine."""
    return nullcontext(file)


def remote_part(
    name: str,
    version: str,
    size: int,
    opened: Callable[[], AbstractContextManager[Path]],
    reading: Reading,
    split: Split | None,
    say: Callable[[str], None],
) -> Part:
    """Return the part of a file that is on another machine. Its format is recognised after it was fetched."""

    def read(file: Path) -> Iterator[pa.Array]:
        content = recognise(file, name, reading)
        _report({name: content}, reading, say)
        yield from _read(file, name, content, reading, say)

    expected = promised(name)[1] or "text" if reading.format == "auto" else reading.format
    return Part(f"{name}@{version}", size, opened, _how(expected, reading), read, split, say)


def _how(format: Format, reading: Reading) -> str:
    if format == "text":
        return f"split by {reading.split_by}"
    return f"{'field' if format in ('json', 'jsonl') else 'column'} {reading.column!r}"


def _read(file: Path, name: str, content: Content, reading: Reading, say: Callable[[str], None]) -> Iterator[pa.Array]:
    column, opened = reading.column, partial(compression.opened, file, content.layers)
    try:
        if content.format == "parquet":
            yield from tables.read_parquet(file, name, column)
        elif content.format == "arrow":
            yield from tables.read_arrow(file, content.layers, name, column)
        elif content.format == "text":
            yield from _in_arrays(text_file.read(opened, name, reading.split_by, say))
        else:
            with opened() as source:
                if content.format == "jsonl":
                    yield from json_lines.read(source, name, column)
                elif content.format == "json":
                    yield from _in_arrays(json_values.read(source, name, column))
                else:
                    yield from _in_arrays(csv_file.read(source, name, column, content.format))
    except InputError as error:
        if content.note:
            raise InputError(f"{error}; or keep all of it as text with --format text") from None
        raise


def _in_arrays(texts: Iterable[str | None]) -> Iterator[pa.Array]:
    held: list[str | None] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text or "")
        if size >= _ARRAY_CHARACTERS or len(held) >= _ARRAY_CHARACTERS:
            yield pa.array(held, pa.large_string())
            held, size = [], 0
    yield pa.array(held, pa.large_string())


def _report(contents: dict[str, Content], reading: Reading, say: Callable[[str], None]) -> None:
    """Say each note once, however many files it is about."""
    by_note: dict[str, list[str]] = {}
    for name, content in contents.items():
        if content.note:
            by_note.setdefault(f"note: {{}} {content.note}", []).append(name)
        if content.has_separators and reading.split_by != "endoftext":
            separated = f"warning: {{}} holds {ENDOFTEXT} as text; --split-by endoftext splits documents there"
            by_note.setdefault(separated, []).append(name)
    for note, names in by_note.items():
        others = counted(len(names) - 1, "file is like it", "files are like it")
        say(note.format(names[0]) + (f" ({others})" if len(names) > 1 else ""))


def documents_of(parts: Sequence[Part]) -> Iterator[str]:
    """Yield the documents as strings."""
    for block in blocks(parts, Position(0, 0)):
        yield from block.texts.to_pylist()
