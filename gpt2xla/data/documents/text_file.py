"""Documents in text files. A file that is mostly not UTF-8 is refused; a few bytes that are not are counted."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import pyarrow as pa

from gpt2xla.data.documents.reading_options import ENDOFTEXT, SplitBy
from gpt2xla.errors import InputError, counted

_BLOCK_BYTES = 4 << 20
_LONGEST_DOCUMENT = 1 << 31  # characters: no tokenizer has enough memory for more
_MOST_BAD_BYTES = 0.1  # of the head. Western European text in an 8-bit encoding has fewer, anything else more.
_REPLACEMENT = "\ufffd"
# No text holds NUL, so splitting at it gives the whole file.
_SEPARATORS: dict[SplitBy, str] = {"file": "\0", "line": "\n", "blank-lines": "\n", "endoftext": ENDOFTEXT}
# Those of 32 bits come first, since they begin with those of 16.
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
_OR_LEAVE_OUT = "or leave it out (--exclude)"
_JAPANESE = re.compile(rb"\x1b\$[@B][!-~]+\x1b\([BJ]")  # ASCII, by its bytes


def check_head(head: bytes, name: str) -> None:
    """Raise InputError, naming the file `name`, if its first bytes are not text in UTF-8."""
    for mark, encoding in _OTHER_ENCODINGS.items():
        if head.startswith(mark):
            raise InputError(f"{name} is text in {encoding}; save it as UTF-8, {_OR_LEAVE_OUT}")
    if _JAPANESE.search(head):
        raise InputError(f"{name} is text in ISO-2022-JP; save it as UTF-8, {_OR_LEAVE_OUT}")
    if b"\0" in head:
        raise _binary(name)
    text = codecs.getincrementaldecoder("utf-8")("ignore").decode(head)  # a character may be cut at the end
    bad = len(head) - len(text.encode())
    if bad > _MOST_BAD_BYTES * len(head) + 3 or 2 * bad > len(head):
        raise InputError(f"{name} is binary, or text that is not UTF-8; convert it to UTF-8, {_OR_LEAVE_OUT}")


def read(
    opened: Callable[[], AbstractContextManager[pa.NativeFile]],
    name: str,
    split_by: SplitBy,
    say: Callable[[str], None],
) -> Iterator[str]:
    """Yield the documents that are not blank, without a byte order mark.

    Bytes that are not UTF-8 become U+FFFD. At the end `say` receives their number, and that of <|endoftext|> read as text.
    Raises InputError for NUL bytes, and for a document that is too long.
    """
    replacements = separators = 0
    with opened() as source, io.TextIOWrapper(source, encoding="utf-8-sig", errors="replace") as text:
        for document in _documents(text, name, split_by):
            replacements += document.count(_REPLACEMENT)
            separators += document.count(ENDOFTEXT)
            if document.strip():
                yield document
    if replacements and (bad := replacements - _count(opened, _REPLACEMENT.encode())):
        became = f"became U+FFFD, {counted(bad, 'time')}"
        say(f"warning: {name}: bytes that are not UTF-8 {became}; convert the file to keep them")
    if separators:
        read = f"was read as text, {counted(separators, 'time')}"
        say(f"warning: {name}: {ENDOFTEXT} {read} (--split-by endoftext splits there)")


def _documents(text: io.TextIOWrapper, name: str, split_by: SplitBy) -> Iterator[str]:
    pieces = _between(_SEPARATORS[split_by], _blocks(text, name), name)
    if split_by == "blank-lines":
        paragraph: list[str] = []
        for line in pieces:
            if line.strip():
                paragraph.append(line)
            else:
                yield "\n".join(paragraph)
                paragraph = []
        yield "\n".join(paragraph)
    elif split_by == "endoftext":
        for piece in pieces:
            yield piece.strip()
    else:
        yield from pieces


def _blocks(text: io.TextIOWrapper, name: str) -> Iterator[str]:
    while block := text.read(_BLOCK_BYTES):
        if "\0" in block:
            raise _binary(name)
        yield block


def _between(separator: str, blocks: Iterable[str], name: str) -> Iterator[str]:
    """Yield the pieces between separators, which may cross blocks. Memory holds one piece and one block."""
    begun: list[str] = []
    size, held = 0, ""  # the size of `begun`; text that may begin a separator
    for block in blocks:
        *complete, rest = (held + block).split(separator)
        for piece in complete:
            yield "".join([*begun, piece])
            begun, size = [], 0
        certain = max(0, len(rest) - len(separator) + 1)
        begun.append(rest[:certain])
        held = rest[certain:]
        size += certain
        if size > _LONGEST_DOCUMENT:
            raise InputError(f"{name} holds a document of over {_LONGEST_DOCUMENT:,} characters; --split-by cuts it up")
    yield "".join([*begun, held])


def _binary(name: str) -> InputError:
    return InputError(f"{name} holds NUL bytes, as binary files and UTF-16 do; save it as UTF-8, {_OR_LEAVE_OUT}")


def _count(opened: Callable[[], AbstractContextManager[pa.NativeFile]], wanted: bytes) -> int:
    found, tail = 0, b""
    with opened() as source:
        while chunk := source.read(_BLOCK_BYTES):
            found += (tail + chunk).count(wanted)
            tail = (tail + chunk)[-(len(wanted) - 1) :]
    return found
