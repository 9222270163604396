"""How the user wants files to be read. It imports nothing heavy: --help must not wait for pyarrow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow"]
SplitBy = Literal["file", "blank-lines", "line", "endoftext"]

ENDOFTEXT = "<|endoftext|>"
# As people name compressed files; the first five are looked for in folders.
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".gzip", ".zstd")
COMPRESSIONS = PACKED[:5]
TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (".parquet", ".arrow", ".feather", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", *TEXT_SUFFIXES)
ALL_SUFFIXES = tuple(suffix + packed for suffix in SUFFIXES for packed in ("", *COMPRESSIONS))

# Beyond this a line, a field or a JSON value is a slip or an attack: it must fit into memory several times.
LONGEST = 16 << 20

INPUT_HELP = "files or folders: text, JSON, CSV, parquet, Arrow; text, JSON and CSV may be compressed"
FORMAT_HELP = "what the files are, where their content does not tell"
SPLIT_HELP = f"what a document is in a text file; endoftext: what lies between two {ENDOFTEXT}"
COLUMN_HELP = "column or field that holds the text in tables and JSON"
EXCLUDE_HELP = "names or patterns (*.bak, raw/*) of files and folders to leave out"


@dataclass(frozen=True)
class Reading:
    """What the options say: the column or field with the text, how text files are cut into documents, and the format."""

    column: str = "text"
    split_by: SplitBy = "file"
    format: Format = "auto"


def described(suffixes: tuple[str, ...]) -> str:
    """The suffixes in a few words."""
    if suffixes == ALL_SUFFIXES:
        return f"{', '.join(SUFFIXES)}, and these with {', '.join(COMPRESSIONS)}"
    return ", ".join(suffixes)
