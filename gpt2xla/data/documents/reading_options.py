"""Options for how files are read, and their help texts. Imports nothing heavy: --help must not wait for pyarrow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow"]
SplitBy = Literal["file", "blank-lines", "line", "endoftext"]

ENDOFTEXT = "<|endoftext|>"
# Endings of compressed files; only the first five are taken from folders.
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".gzip", ".zstd")
COMPRESSIONS = PACKED[:5]
TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (".parquet", ".arrow", ".feather", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", *TEXT_SUFFIXES)
ALL_SUFFIXES = tuple(suffix + packed for suffix in SUFFIXES for packed in ("", *COMPRESSIONS))

# The largest line, field or JSON value: it must fit into memory several times.
LONGEST = 16 << 20

INPUT_HELP = "files or folders: text, JSON, CSV, parquet, Arrow; text, JSON and CSV may be compressed"
FORMAT_HELP = "format of the files, if their content does not show it"
SPLIT_HELP = f"what counts as a document in a text file; endoftext: the text between two {ENDOFTEXT}"
COLUMN_HELP = "column or field that holds the text in tables and JSON"
EXCLUDE_HELP = "names or patterns (*.bak, raw/*) of files and folders to leave out"


@dataclass(frozen=True)
class Reading:
    """How files are read: the column or field with the text, how text files are split into documents, and the format."""

    column: str = "text"
    split_by: SplitBy = "file"
    format: Format = "auto"


def described(suffixes: tuple[str, ...]) -> str:
    """Return the suffixes in a few words."""
    if suffixes == ALL_SUFFIXES:
        return f"{', '.join(SUFFIXES)}, and these with {', '.join(COMPRESSIONS)}"
    return ", ".join(suffixes)
