"""Documents in text files, plain or compressed. What is no UTF-8 is refused where it is most of a file, and counted where it
is little."""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from gpt2xla.errors import InputError

_BLOCK_BYTES = 4 << 20
_HEAD_BYTES = 64 << 10
_MOST_BAD_BYTES = 0.1  # of the head. Western European text in an 8-bit encoding has less, all else more.
_REPLACEMENT = "\ufffd"
# Those of 32 bits first: they begin with those of 16.
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def check_head(file: Path, name: str) -> None:
    """Raises InputError, naming the file `name`, if it begins as no text in UTF-8 does."""
    with pa.input_stream(str(file)) as source:
        head = source.read(_HEAD_BYTES)
    for mark, encoding in _OTHER_ENCODINGS.items():
        if head.startswith(mark):
            raise InputError(f"{name} is text in {encoding}; save it as UTF-8, or leave it out (--exclude)")
    if b"\0" in head:
        raise _binary(name)
    text = codecs.getincrementaldecoder("utf-8")("ignore").decode(head)  # a character cut at the end is not bad
    if len(head) - len(text.encode()) > _MOST_BAD_BYTES * len(head) + 3:
        raise InputError(
            f"{name} is binary, or text in another encoding than UTF-8; convert it to UTF-8, or leave it out (--exclude)"
        )


def read(file: Path, name: str, split_by: str, say: Callable[[str], None]) -> Iterator[pa.Array]:
    """The documents that are not blank, in arrays of a few MB. Bytes that are no UTF-8 become U+FFFD, and `say` gets a line
    with their number at the end of the file. Raises InputError as `check_head` does, for NUL bytes anywhere."""
    check_head(file, name)
    held: list[str] = []
    size = replacements = 0
    with pa.input_stream(str(file)) as source, io.TextIOWrapper(source, encoding="utf-8", errors="replace") as lines:
        for document in _documents_in(lines, split_by):
            if "\0" in document:
                raise _binary(name)
            replacements += document.count(_REPLACEMENT)
            if document.strip():
                held.append(document)
                size += len(document)
            if size >= _BLOCK_BYTES:
                yield pa.array(held, pa.large_string())
                held, size = [], 0
    yield pa.array(held, pa.large_string())
    if replacements and (bad := replacements - _count(file, _REPLACEMENT.encode())):
        say(f"warning: {name}: bytes that are not UTF-8 became U+FFFD, {bad:,} times; convert the file to keep them")


def _binary(name: str) -> InputError:
    return InputError(
        f"{name} holds NUL bytes, as binary files and UTF-16 do; save it as UTF-8, or leave it out (--exclude)"
    )


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


def _count(file: Path, wanted: bytes) -> int:
    found, tail = 0, b""
    with pa.input_stream(str(file)) as source:
        while chunk := source.read(_BLOCK_BYTES):
            found += (tail + chunk).count(wanted)
            tail = (tail + chunk)[-(len(wanted) - 1) :]
    return found
