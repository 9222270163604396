"""Recognises files that hold no token ids, whatever their names, by their first bytes."""

from __future__ import annotations

import codecs
import re
import unicodedata

from gpt2xla.config.paths import PREPARE
from gpt2xla.data.shard_files.first_bytes import foreign

_MOVE = "it is no token shard: move it out of the folder"
_PREPARE = f"make token shards of it with {PREPARE}"
# The fix for formats that are not supported, if it is not "move it".
_FIXES = {
    **dict.fromkeys(("parquet", "arrow", "feather-1", "avro"), _PREPARE),
    "zip": f"unpack it, or if {_MOVE}",
    "numpy": "copy it again: it is cut short",
    "megatron-index": "its name ended in .idx: rename it back",
}
_LLMC = {  # by the number that llm.c's files begin with, a date
    20240326: "an llm.c model checkpoint",
    20240327: "the debug state of an llm.c model",
    20240328: "an llm.c tokenizer",
    20240522: "an llm.c evaluation (HellaSwag, MMLU)",
}


def foreign_format(head: bytes, size: int) -> str | None:
    """Return what a file is and the fix, to follow its name and "is"; None if it may hold ids.

    Args:
        head: its first HEAD_BYTES.
        size: its length in bytes.
    """
    if found := foreign(head):
        return f"{found.what}; {_FIXES.get(found.kind, found.fix or _MOVE)}"
    if head.startswith(b"LITPKDDS"):
        return f"packed by an early lit-llama, which is not supported; {_PREPARE} from its text"
    if _is_text(head):
        return f"text, not token ids; {_PREPARE}"
    if name := _of_llmc(head):
        return f"{name}; {_MOVE}"
    if _is_litdata_chunk(head, size):
        return f"a chunk of a litdata data set, which is not supported; {_PREPARE} from its text"
    return None


def pointer(head: bytes) -> str | None:
    """Return the same for the pointer that version control leaves in a file's place; None for anything else."""
    found = foreign(head)
    return f"{found.what}; {found.fix}" if found and found.kind == "pointer" else None


def _is_text(head: bytes) -> bool:
    """Tell whether `head` is UTF-8 without control characters, perhaps cut at the end, or UTF-16 with a byte order mark."""
    encoding = "utf-16" if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8"
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return text != "" and all(unicodedata.category(c) != "Cc" or c in "\t\n\r\f\x1b" for c in text)


def _of_llmc(head: bytes) -> str | None:
    """Recognise headers of 256 int32: a date, a version, sizes, zeros. Source: llm.c's train_gpt2.py, data_common.py."""
    magic, version = (int.from_bytes(head[start : start + 4], "little") for start in (0, 4))
    is_date = re.fullmatch(r"20[2-4]\d(0[1-9]|1[0-2])([0-2]\d|3[01])", str(magic))
    if len(head) < 1024 or not is_date or version > 1000 or any(head[64:1024]):
        return None
    return _LLMC.get(magic, f"one of llm.c's files of an unknown kind ({magic})")


def _is_litdata_chunk(head: bytes, size: int) -> bool:
    """Recognise uint32 at the start: the number of items, then where each begins. Source: litdata's streaming/writer.py."""
    items, first = (int.from_bytes(head[start : start + 4], "little") for start in (0, 4))
    return items > 0 and first == 4 * (items + 2) <= size
