"""Documents on disk: parts in a fixed order, each a file that can be read again from its beginning.

Texts travel as Arrow arrays, a few MB at a time: no Python string is made of a document on the way to its ids.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.json
import pyarrow.parquet

from gpt2xla.errors import InputError, blaming

Split = Literal["train", "test"]

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson")
ALL_SUFFIXES = (".parquet", ".arrow", *JSON_SUFFIXES, *TEXT_SUFFIXES, ".txt.gz", ".txt.zst")
_NO_TEXT = (".json", ".csv", ".tsv", ".zip", ".tar", ".tar.gz", ".npy", ".bin", ".pdf", ".xml.gz")
_BLOCK_BYTES = 4 << 20
_ROWS_AT_ONCE = 64
_LONGEST_JSON_LINE = 16 << 20


@dataclass(frozen=True)
class Part:
    """One file of a corpus.

    Attributes:
        name, size, how: what it is known by when an interrupted preparation goes on: size in bytes, and how it is read.
        opened: around its reading; brings the file here if it is elsewhere.
        read: the documents of the file, in arrays of texts.
        split: where its documents go; None: each is drawn.
    """

    name: str
    size: int
    opened: Callable[[], AbstractContextManager[Path]]
    read: Callable[[Path], Iterator[pa.Array]]
    how: str
    split: Split | None = None


class Position(NamedTuple):
    """How far a corpus has been read: `documents` of part number `part`, and all parts before it."""

    part: int
    documents: int


class Block(NamedTuple):
    texts: pa.LargeStringArray
    split: Split | None
    after: Position


def blocks(parts: Sequence[Part], start: Position) -> Iterator[Block]:
    """The documents from `start` on, without the empty ones, in blocks of about 4 MB.

    Raises:
        InputError: a part cannot be read as what its name says.
    """
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
                documents += len(texts)
                if len(fresh):
                    held.append(fresh)
                if sum(array.nbytes for array in held) >= _BLOCK_BYTES:
                    yield Block(pa.concat_arrays(held), part.split, Position(number, documents))
                    held = []
    if held:
        yield Block(pa.concat_arrays(held), parts[-1].split, Position(len(parts), 0))


def _readable(part: Part, file: Path) -> Iterator[pa.LargeStringArray]:
    try:
        for array in part.read(file):
            _check_type(part, array.type)
            texts = array.cast(pa.large_string())
            texts = texts.filter(pc.greater(pc.binary_length(texts), 0))
            texts.validate(full=True)  # parquet promises UTF-8, and nobody checks
            yield texts
    except (pa.ArrowException, OSError, EOFError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{part.name} cannot be read ({reason}); mend it, or copy or make it again") from None


def _check_type(part: Part, kind: pa.DataType) -> None:
    """Numbers and dates would become text, too, without a word."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    texts = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_null,
    )
    if not any(is_text(kind) for is_text in texts):
        raise InputError(f"{part.name}: {part.how} holds {kind}, not text; choose another with --text-column")


def local_parts(
    paths: Iterable[str | Path],
    *,
    suffixes: tuple[str, ...] = ALL_SUFFIXES,
    exclude: tuple[str, ...] = (),
    column: str = "text",
    split_by: str = "file",
    option: str = "--input",
) -> list[Part]:
    """Files, and those in or below folders whose name ends in one of `suffixes`, in sorted order, but not below folders
    named in `exclude`: parquet, Arrow, JSON lines, and text in everything else, gzip and zstd among it. A folder that
    `datasets` saved is read in its own order; of several splits in one, "train".

    `column` holds the text in tables; `split_by` cuts text files: "file", "blank-lines" or "line".

    Raises:
        InputError: a path does not exist, or nothing was found.
    """
    parts = []
    for file in _files(paths, suffixes, exclude, option):
        with blaming(f"{option} {file}"):
            size = file.stat().st_size
        parts.append(Part(str(file), size, partial(_here, file), *reader(file.name, column, split_by)))
    if not parts:
        raise InputError(f"{option} {' '.join(map(str, paths))}: no files ending in {', '.join(suffixes)}")
    return parts


def reader(name: str, column: str, split_by: str = "line") -> tuple[Callable[[Path], Iterator[pa.Array]], str]:
    """What reads a file of this name, and how."""
    name = name.lower()
    if name.endswith(".parquet"):
        return partial(_read_parquet, column=column), f"column {column!r}"
    if name.endswith(".arrow"):
        return partial(_read_arrow, column=column), f"column {column!r}"
    if name.endswith(JSON_SUFFIXES):
        return partial(_read_json_lines, column=column), f"field {column!r}"
    if name.endswith(_NO_TEXT):
        raise InputError(f"{name} is no text; can read {', '.join(ALL_SUFFIXES)}, and what else is text")
    return partial(_read_text, split_by=split_by), f"split by {split_by}"


def documents_of(parts: Sequence[Part]) -> Iterator[str]:
    """The documents as strings, for what learns from text."""
    for block in blocks(parts, Position(0, 0)):
        yield from block.texts.to_pylist()


def _here(file: Path) -> AbstractContextManager[Path]:
    return nullcontext(file)


def _files(
    paths: Iterable[str | Path], suffixes: tuple[str, ...], exclude: tuple[str, ...], option: str
) -> Iterator[Path]:
    for path in map(Path, paths):
        if (path / "dataset_dict.json").is_file():
            path = path / "train"
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            yield from sorted(path.glob("data-*.arrow"))
        elif path.is_file():
            yield _checked(path, option)
        elif path.is_dir():
            yield from _files_below(path, suffixes, exclude, option)
        else:
            raise InputError(f"{option} {path}: no such file or folder")


def _files_below(top: Path, suffixes: tuple[str, ...], exclude: tuple[str, ...], option: str) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"{option} {error.filename}: {error.strerror}; make it readable, or leave it out: --exclude")

    seen = {os.path.realpath(top)}
    for folder, subfolders, files in os.walk(top, onerror=refuse, followlinks=True):
        for name in sorted(subfolders):
            real = os.path.realpath(Path(folder, name))
            if name in exclude or real in seen:  # links may lead back
                subfolders.remove(name)
            seen.add(real)
        subfolders.sort()
        for name in sorted(files):
            if name.lower().endswith(suffixes):
                yield _checked(Path(folder, name), option)


def _checked(file: Path, option: str) -> Path:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise InputError(f"{option} {str(file)!a}: its name is not UTF-8; rename it") from None
    if file.exists() and not file.is_file():  # to read from a pipe would wait for ever
        raise InputError(f"{option} {file} is no regular file; leave it out")
    return file


def _read_parquet(file: Path, column: str) -> Iterator[pa.Array]:
    with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as table:
        _check_column(file, column, table.schema_arrow.names)
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[column]):
            yield batch.column(0)


def _read_arrow(file: Path, column: str) -> Iterator[pa.Array]:
    with pa.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as batches:
        _check_column(file, column, batches.schema.names)
        for batch in batches:
            yield batch.column(column)


def _read_json_lines(file: Path, column: str) -> Iterator[pa.Array]:
    options = pyarrow.json.ParseOptions(
        explicit_schema=pa.schema([(column, pa.string())]), unexpected_field_behavior="ignore"
    )
    size = pyarrow.json.ReadOptions(block_size=_LONGEST_JSON_LINE)
    with pa.input_stream(str(file)) as source:
        for batch in pyarrow.json.open_json(source, read_options=size, parse_options=options):
            if batch.num_rows and batch.column(0).null_count == batch.num_rows:
                raise InputError(f"{file} has no field {column!r} in its lines; name the right one: --text-column")
            yield batch.column(0)


def _read_text(file: Path, split_by: str) -> Iterator[pa.Array]:
    with pa.input_stream(str(file)) as source, io.TextIOWrapper(source, encoding="utf-8", errors="replace") as lines:
        held: list[str] = []
        size = 0
        for document in _documents_in(lines, split_by):
            if document.strip():
                held.append(document)
                size += len(document)
            if size >= _BLOCK_BYTES:
                yield pa.array(held, pa.large_string())
                held, size = [], 0
        yield pa.array(held, pa.large_string())


def _documents_in(lines: io.TextIOWrapper, split_by: str) -> Iterator[str]:
    if split_by == "file":
        yield lines.read()
    elif split_by == "line":
        for line in lines:
            yield line.rstrip("\n")
    else:
        paragraph: list[str] = []
        for line in lines:
            if line.strip():
                paragraph.append(line)
            else:
                yield "".join(paragraph).rstrip("\n")
                paragraph = []
        yield "".join(paragraph).rstrip("\n")


def _check_column(file: Path, column: str, names: list[str]) -> None:
    if column not in names:
        raise InputError(f"{file} has no column {column!r} but {', '.join(names)}; choose with --text-column")
