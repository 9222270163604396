"""Files that hold no token ids whatever they are called, told by their first bytes."""

from __future__ import annotations

import codecs
import re
import unicodedata

HEAD_BYTES = 4096

_MOVE = "it is no token shard: move it out of the folder"
_DECOMPRESS = "decompress it first"
_PREPARE = "make token shards of it with scripts/prepare_text.py"

_POINTERS = [
    (
        rb"version https?://[\w./-]*(git-lfs|git-media|hawser)",
        "a Git LFS pointer; run `git lfs pull` where it came from",
    ),
    (rb"/annex/objects/", "a git-annex pointer; run `git annex get` where it came from"),
]
# Four bytes or more each: a file of ids begins like that by chance less than once in a billion.
_BEGINNINGS = [
    *_POINTERS,
    (rb"\x1f\x8b\x08[\0-\x1f]", f"compressed with gzip; {_DECOMPRESS}"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", f"compressed with bzip2; {_DECOMPRESS}"),
    (rb"\xfd7zXZ\0", f"compressed with xz; {_DECOMPRESS}"),
    (rb"[\x22-\x28]\xb5\x2f\xfd", f"compressed with zstd; {_DECOMPRESS}"),
    (rb"\x04\x22\x4d\x18", f"compressed with lz4; {_DECOMPRESS}"),
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07|.{257}ustar", "an archive; unpack it first"),
    (rb"PK\x03\x04|PK\x05\x06", f"a zip archive, as .npz and PyTorch's files are; unpack it, or if {_MOVE}"),
    (rb"PAR1|ARROW1\0\0|\xff{4}..[\0-\x0f]\0", f"a parquet or Arrow file; {_PREPARE} or prepare_fineweb.py"),
    (rb"GGUF|lmgg|fmgg|tjgg|algg|24ka", f"a model of llama.cpp or llama2.c; {_MOVE}"),
    (rb".{4}\0{4}\{\s*\"", f"a safetensors file; {_MOVE}"),
    (rb"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", f"a PyTorch file from before version 1.6; {_MOVE}"),
    (rb"\x80[\4\5]\x95.{5}\0\0\0|\x80[\2\3](c[\w.]+\n|[\]}]q.)", f"a pickle; {_MOVE}"),
    (rb"\x7fELF|\x89HDF\r\n\x1a\n|SQLite format 3\0", f"a program, an HDF5 file or a database; {_MOVE}"),
    (rb"\x89PNG\r\n|\xff\xd8\xff[\xdb\xe0\xe1\xee]|%PDF-|RIFF", f"an image, a sound or a document; {_MOVE}"),
    (rb"MMIDIDX\0\0|TNTIDX\0\0", "a Megatron index under another name; call it .idx again"),
    (rb"\x93NUM\Z", "the beginning of a numpy file; copy it again"),
    (rb"LITPKDDS", f"packed by an early lit-llama, which is not read; {_PREPARE} from its text"),
]
_PATTERNS = [(re.compile(pattern, re.DOTALL), what) for pattern, what in _BEGINNINGS]
_LLMC = {  # by the number that llm.c's files begin with, a date
    20240326: "an llm.c model checkpoint",
    20240327: "the debug state of an llm.c model",
    20240328: "an llm.c tokenizer",
    20240522: "an llm.c evaluation (HellaSwag, MMLU)",
}


def foreign_format(head: bytes, size: int) -> str | None:
    """What a file is and what to do about it, to follow its name and "is"; None where nothing speaks against ids.

    Args:
        head: its first HEAD_BYTES.
        size: its length in bytes.
    """
    for pattern, what in _PATTERNS:
        if pattern.match(head):
            return what
    if _is_text(head):
        return f"text, not token ids; {_PREPARE}"
    if name := _of_llmc(head):
        return f"{name}; {_MOVE}"
    if _is_litdata_chunk(head, size):
        return f"a chunk of a litdata data set, which is not read; {_PREPARE} from its text"
    return None


def pointer(head: bytes) -> str | None:
    """`foreign_format` for what version control leaves in a file's place."""
    return next((what for pattern, what in _PATTERNS[: len(_POINTERS)] if pattern.match(head)), None)


def _is_text(head: bytes) -> bool:
    """UTF-8 without control characters, but for a character cut at the end; or UTF-16 that begins with a byte order mark."""
    encoding = "utf-16" if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8"
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return text != "" and all(unicodedata.category(c) != "Cc" or c in "\t\n\r\f\x1b" for c in text)


def _of_llmc(head: bytes) -> str | None:
    """Headers of 256 int32: a date, a version, sizes, zeros. Source: llm.c's train_gpt2.py and dev/data/data_common.py."""
    magic, version = (int.from_bytes(head[start : start + 4], "little") for start in (0, 4))
    is_date = re.fullmatch(r"20[2-4]\d(0[1-9]|1[0-2])([0-2]\d|3[01])", str(magic))
    if len(head) < 1024 or not is_date or version > 1000 or any(head[64:1024]):
        return None
    return _LLMC.get(magic, f"one of llm.c's files of an unknown kind ({magic})")


def _is_litdata_chunk(head: bytes, size: int) -> bool:
    """They begin with uint32: the number of items, then where each begins. Source: litdata's streaming/writer.py."""
    items, first = (int.from_bytes(head[start : start + 4], "little") for start in (0, 4))
    return items > 0 and first == 4 * (items + 2) <= size
