"""Documents on disk: parts in a fixed order, each a file that can be read again from its beginning.

Texts travel as Arrow arrays, a few MB at a time: no Python string is made of a document on the way to its ids.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet

from gpt2xla.data import json_lines, text_file
from gpt2xla.errors import InputError, blaming

Split = Literal["train", "test"]

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson")
ALL_SUFFIXES = (".parquet", ".arrow", *JSON_SUFFIXES, *TEXT_SUFFIXES, ".txt.gz", ".txt.zst")
_NO_TEXT = (".json", ".csv", ".tsv", ".zip", ".tar", ".tar.gz", ".npy", ".bin", ".pdf", ".xml.gz")
_BLOCK_BYTES = 4 << 20
_ROWS_AT_ONCE = 64


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
    """The documents from `start` on, without the empty ones, in blocks of about 4 MB. The last one, and no other, is `after`
    all parts.

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
                if len(fresh) and sum(array.nbytes for array in held) >= _BLOCK_BYTES:
                    yield Block(pa.concat_arrays(held), part.split, Position(number, documents))
                    held = []
                if len(fresh):
                    held.append(fresh)
                documents += len(texts)
    if held:
        yield Block(pa.concat_arrays(held), parts[-1].split, Position(len(parts), 0))


def _readable(part: Part, file: Path) -> Iterator[pa.LargeStringArray]:
    try:
        for array in part.read(file):
            texts = array.cast(pa.large_string())
            texts = texts.filter(pc.greater(pc.binary_length(texts), 0))
            texts.validate(full=True)  # parquet promises UTF-8, and nobody checks
            yield texts
    except (pa.ArrowException, OSError, EOFError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{part.name} cannot be read ({reason}); mend it, or copy or make it again") from None


def local_parts(
    paths: Sequence[str | Path],
    *,
    suffixes: tuple[str, ...] = ALL_SUFFIXES,
    exclude: tuple[str, ...] = (),
    column: str = "text",
    split_by: str = "file",
    option: str = "--input",
    say: Callable[[str], None] = print,
) -> list[Part]:
    """Files, and those in or below folders whose name ends in one of `suffixes`, in sorted order, but no files or folders
    named in `exclude`: parquet, Arrow, JSON lines, and text in everything else, gzip and zstd among it. A folder that
    `datasets` saved is read in its own order; of several splits in one, "train".

    `column` holds the text in tables; `split_by` cuts text files: "file", "blank-lines" or "line".

    Raises:
        InputError: a path does not exist, nothing was found, or a text file begins as none does.
    """
    parts = []
    for file in _files(paths, suffixes, exclude, option):
        read, how = reader(str(file), column, split_by, say)
        with blaming(f"{option} {file}"):
            if _is_text(file.name):  # an hour into the preparation would be late to say so
                text_file.check_head(file, str(file))
            parts.append(Part(str(file), file.stat().st_size, partial(_here, file), read, how))
    if not parts:
        raise InputError(f"{option} {' '.join(map(str, paths))}: no files ending in {', '.join(suffixes)}")
    return parts


def reader(
    name: str, column: str, split_by: str = "line", say: Callable[[str], None] = print
) -> tuple[Callable[[Path], Iterator[pa.Array]], str]:
    """What reads a file of this name, and how. Messages call it so, wherever it lies; `say` gets the warnings."""
    lower = name.lower()
    if lower.endswith(".parquet"):
        return partial(_read_parquet, name=name, column=column), f"column {column!r}"
    if lower.endswith(".arrow"):
        return partial(_read_arrow, name=name, column=column), f"column {column!r}"
    if lower.endswith(JSON_SUFFIXES):
        return partial(json_lines.read, name=name, column=column), f"field {column!r}"
    if lower.endswith(_NO_TEXT):
        raise InputError(f"{name} is no text; can read {', '.join(ALL_SUFFIXES)}, and what else is text")
    return partial(text_file.read, name=name, split_by=split_by, say=say), f"split by {split_by}"


def _is_text(name: str) -> bool:
    return not name.lower().endswith((".parquet", ".arrow", *JSON_SUFFIXES))


def documents_of(parts: Sequence[Part]) -> Iterator[str]:
    """The documents as strings, for what learns from text."""
    for block in blocks(parts, Position(0, 0)):
        yield from block.texts.to_pylist()


def _here(file: Path) -> AbstractContextManager[Path]:
    return nullcontext(file)


def _files(
    paths: Sequence[str | Path], suffixes: tuple[str, ...], exclude: tuple[str, ...], option: str
) -> Iterator[Path]:
    if "" in paths:
        raise InputError(f"{option} is empty; name a file or folder, the one you are in as .")
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
            if name.lower().endswith(suffixes) and name not in exclude:
                yield _checked(Path(folder, name), option)


def _checked(file: Path, option: str) -> Path:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise InputError(f"{option} {str(file)!a}: its name is not UTF-8; rename it") from None
    if file.exists() and not file.is_file():  # to read from a pipe would wait for ever
        raise InputError(f"{option} {file} is no regular file; leave it out")
    return file


def _read_parquet(file: Path, name: str, column: str) -> Iterator[pa.Array]:
    with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as table:
        _check_column(name, column, table.schema_arrow)
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[column]):
            yield batch.column(0)


def _read_arrow(file: Path, name: str, column: str) -> Iterator[pa.Array]:
    with pa.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as batches:
        _check_column(name, column, batches.schema)
        for batch in batches:
            yield batch.column(column)


def _check_column(name: str, column: str, schema: pa.Schema) -> None:
    texts = [field.name for field in schema if _holds_text(field.type)]
    if column in texts:
        return
    if column in schema.names:
        kind = str(schema.field(column).type)
        held = f"column {column!r} holds {kind[:60]}{'...' * (len(kind) > 60)}, not text"
    else:
        held = f"no column {column!r} but {', '.join(schema.names)}"
    mend = f"text is in {', '.join(texts)}; choose with --text-column" if texts else "no column holds text"
    raise InputError(f"{name}: {held}; {mend}")


def _holds_text(kind: pa.DataType) -> bool:
    """Numbers and dates would become text, too, without a word."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    texts = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_null,
    )
    return any(is_text(kind) for is_text in texts)
