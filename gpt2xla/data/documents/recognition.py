"""Recognises what a file holds: by its first bytes, or if these leave it open by its name; refuses what neither settles."""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from gpt2xla.data.documents import compression, text_file
from gpt2xla.data.documents.reading_options import ENDOFTEXT, LONGEST, PACKED, Format, Reading
from gpt2xla.data.shard_files.first_bytes import Foreign, foreign
from gpt2xla.errors import InputError

_PROMISES: dict[str, Format] = {
    ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow", ".jsonl": "jsonl",
    ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv",
}  # fmt: skip
# Names that promise a format that is not supported: such a file looks like text only by accident.
_OTHER = (
    ".zip", ".tar", ".tgz", ".7z", ".rar", ".z", ".br", ".lzma", ".npy", ".npz", ".bin", ".pt", ".pth", ".pkl", ".pickle",
    ".safetensors", ".gguf", ".h5", ".db", ".sqlite", ".avro", ".orc", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".odt",
    ".epub", ".png", ".jpg", ".jpeg", ".gif", ".mp3", ".mp4", ".wav",
)  # fmt: skip
_NAMES: dict[Format, str] = {
    "jsonl": "JSON lines", "json": "JSON", "csv": "CSV", "tsv": "TSV", "parquet": "parquet", "arrow": "Arrow",
}  # fmt: skip
# The fix for formats that are not supported, if it is not "give text".
_FIXES = {
    **dict.fromkeys(("zip", "7z", "rar", "tar"), "unpack it and name what is inside"),
    **dict.fromkeys(("avro", "hdf5", "pickle"), "convert it to parquet"),
    "feather-1": "write it again as parquet: pandas.read_feather(...).to_parquet(...)",
    "encrypted-parquet": "decrypt it",
    "numpy": "give text, not tokens",
    "sqlite": "export the column with the text as CSV",
    "pdf": "export its text: pdftotext",
    "document": "export its text",
    "wiki": "extract its text first, as WikiExtractor does",
    "web-archive": "extract its text first, as datatrove or warcio do",
}
_MARKUP = {  # text with markup that no model should learn, by its beginning
    b"<mediawiki": Foreign("wiki", "a MediaWiki dump"),
    b"WARC/1.": Foreign("web-archive", "a web archive (WARC, WET)"),
}
_CONTROL = re.compile(rb"[\0-\x06\x0e-\x1a\x1c-\x1f]")  # not in text, which may begin with PARENTS or GGUF
_HTML = re.compile(rb"\s*<(!doctype html|html)\b", re.IGNORECASE)
_LIKE_JSON = re.compile(rb'\s*(\{\s*(["}]|\Z)|\[\s*(\{\s*(["}]|\Z)|"|\Z))')


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        layers: the codecs that wrap it, the outermost first.
        note: a note for the user, to follow the file's name; "" for none.
        has_separators: whether its first part holds <|endoftext|>.
    """

    format: Format
    layers: tuple[str, ...] = ()
    note: str = ""
    has_separators: bool = False


def promised(name: str) -> tuple[str, Format | None]:
    """Return the suffix of a file's name, without those of compression, and the supported format that it promises."""
    stem, suffix = os.path.splitext(name.lower())
    while suffix in PACKED:
        stem, suffix = os.path.splitext(stem)
    return suffix, _PROMISES.get(suffix)


def recognise(file: Path, name: str, reading: Reading) -> Content:
    """Return what `file`, called `name` in messages, holds. Raises InputError if it is not supported, or not certain."""
    with compression.readable(name):
        layers = compression.layers_of(file, name)
        head = compression.head(file, layers)
        if reading.format == "auto":
            content = _recognised(file, name, layers, head, reading.column)
        else:
            content = Content(reading.format, layers)
    if content.format == "text":
        text_file.check_head(head, name)
        return Content("text", layers, content.note, ENDOFTEXT.encode() in head)
    if layers and (content.format == "parquet" or head.startswith(b"ARROW1")):
        raise InputError(f"{name} is {_NAMES[content.format]} compressed once more ({layers[0]}); decompress it first")
    return content


def _recognised(file: Path, name: str, layers: tuple[str, ...], head: bytes, column: str) -> Content:
    _refuse_foreign(head, name)
    suffix, promise = promised(name)
    text = head.removeprefix(codecs.BOM_UTF8)
    if (found := _certain(file, layers, text)) is not None:
        same = promise == found or {promise, found} == {"json", "jsonl"}
        note = "" if same else f"holds {_NAMES[found]} and is read as such (--format text would keep it as text)"
        return Content(found, layers, note)
    text_file.check_head(head, name)
    if suffix in _OTHER:
        raise InputError(f"{name} is text under a name that ends in {suffix}; rename it, or give --format text")
    if name.lower().endswith(PACKED) and not layers:
        held = "holds plain text" if head else "is empty"
        raise InputError(f"{name} {held}, though its name says compressed; copy it again, rename it, or give --format")
    if promise in ("json", "jsonl") and text.lstrip().startswith((b"[", b'"')):
        return Content("json", layers)
    if promise in ("csv", "tsv") and not _HTML.match(text):
        return Content(promise, layers)
    if promise and (text.strip() or promise in ("parquet", "arrow")):
        held = "an HTML page, perhaps of an error" if _HTML.match(text) else "text" if head else "nothing"
        raise InputError(f"{name} holds {held}, not {_NAMES[promise]}; copy it again, rename it, or give --format text")
    if layers and text.startswith((b"<?xml", b"<mediawiki")):
        raise InputError(f"{name} is XML; extract its text first, or keep the tags with --format text")
    if not promise and (kind := _like_table(text, column)):
        raise InputError(f"{name} looks like {kind.upper()} with a column {column!r}; give --format {kind} or text")
    return Content(promise or "text", layers)


def _refuse_foreign(head: bytes, name: str) -> None:
    found = next((kind for start, kind in _MARKUP.items() if head.startswith(start)), None) or foreign(head)
    if found is None or found.kind in ("parquet", "arrow"):  # these are supported
        return
    # Without control characters, other formats are text that happens to begin like this.
    if found.kind in ("pointer", "pdf", "document", "wiki", "web-archive") or _CONTROL.search(head):
        fix = _FIXES.get(found.kind, found.fix or "give text")
        raise InputError(f"{name} is {found.what}; {fix}, or leave it out (--exclude)")


def _certain(file: Path, layers: tuple[str, ...], text: bytes) -> Format | None:
    """Return the format of a file that begins as no other format does, or None.

    A whole object on the first line makes it JSON lines; in pretty-printed JSON the object ends further down.
    """
    if text.startswith(b"PAR1") and _CONTROL.search(text):
        return "parquet"
    if text.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if not (start := _LIKE_JSON.match(text)) or b"\0" in text:
        return None
    if start.group().lstrip().startswith(b"["):
        return "json"
    first = text.strip().partition(b"\n")[0]
    if len(first) > compression.HEAD_BYTES // 2:  # perhaps only a part of the line
        with compression.opened(file, layers) as stream:
            first = stream.read(LONGEST).removeprefix(codecs.BOM_UTF8).strip().partition(b"\n")[0]
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return "json"
    return "jsonl"


def _like_table(text: bytes, column: str) -> Format | None:
    """Return the kind of table that a text looks like: its first line is several short names, among them `column`."""
    header, *rest = text.decode(errors="replace").splitlines() or [""]
    for delimiter in ",;\t":
        names = next(csv.reader([header], delimiter=delimiter), [])
        if column in names and len(names) > 1 and rest and all(0 < len(name) < 64 for name in names):
            return "tsv" if delimiter == "\t" else "csv"
    return None
