"""Recognises formats by a file's first bytes, whatever its name: what users give where text, ids or a model is expected."""

from __future__ import annotations

import re
from typing import NamedTuple

HEAD_BYTES = 4096

_PULL = "run `git lfs pull` where it came from"
_GET = "run `git annex get` where it came from"
_DECOMPRESS = "decompress it first"
_UNPACK = "unpack it first"
_PROGRAM = "which may hold a program"


class Foreign(NamedTuple):
    """A format that was recognised.

    Attributes:
        kind: a short name.
        what: a description, to follow a file's name and "is".
        fix: the fix, whatever was expected; "" if it depends on that.
    """

    kind: str
    what: str
    fix: str = ""


# By chance, ids begin like one of these less than once in a billion files. Text may, like those that are only letters.
_BEGINNINGS: tuple[tuple[bytes, Foreign], ...] = (
    (rb"version https?://[\w./-]*(git-lfs|git-media|hawser)", Foreign("pointer", "a Git LFS pointer", _PULL)),
    (rb"/annex/objects/", Foreign("pointer", "a git-annex pointer", _GET)),
    (rb"\x1f\x8b\x08[\0-\x1f]", Foreign("gzip", "compressed with gzip", _DECOMPRESS)),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", Foreign("bzip2", "compressed with bzip2", _DECOMPRESS)),
    (rb"\xfd7zXZ\0", Foreign("xz", "compressed with xz", _DECOMPRESS)),
    (rb"[\x22-\x28]\xb5\x2f\xfd", Foreign("zstd", "compressed with zstd", _DECOMPRESS)),
    (rb"\x04\x22\x4d\x18", Foreign("lz4", "compressed with lz4", _DECOMPRESS)),
    (rb"\x02\x21\x4c\x18", Foreign("lz4-legacy", "compressed in lz4's legacy format", f"{_DECOMPRESS}: lz4 -d")),
    (rb"LZIP\x01", Foreign("lzip", "compressed with lzip", _DECOMPRESS)),
    (rb"\]\0\0.{2}(\xff{8}|.{5}\0{3})", Foreign("lzma", "compressed as .lzma", f"{_DECOMPRESS}: unlzma")),
    (rb"\x1f\x9d[\x89-\x90]", Foreign("compress", "compressed with compress (.Z)", _DECOMPRESS)),
    (rb"\xff\x06\0\0sNaPpY", Foreign("snappy", "compressed with snappy", _DECOMPRESS)),
    (rb"PK\x03\x04|PK\x05\x06", Foreign("zip", "a zip archive (or an Office, EPUB, .npz or .pt file)", _UNPACK)),
    (rb"7z\xbc\xaf\x27\x1c", Foreign("7z", "a 7z archive", _UNPACK)),
    (rb"Rar!\x1a\x07", Foreign("rar", "a rar archive", _UNPACK)),
    (rb".{257}ustar", Foreign("tar", "a tar archive", _UNPACK)),
    (rb"PAR1", Foreign("parquet", "a parquet file")),
    (rb"ARROW1\0\0|\xff{4}..[\0-\x0f]\0", Foreign("arrow", "an Arrow file")),
    (rb"FEA1", Foreign("feather-1", "Feather version 1")),
    (rb"PARE", Foreign("encrypted-parquet", "encrypted parquet")),
    (rb"Obj\x01", Foreign("avro", "Avro")),
    (rb"\x93NUM(PY|\Z)", Foreign("numpy", "a .npy array")),
    (rb"MMIDIDX\0\0|TNTIDX\0\0", Foreign("megatron-index", "a Megatron index")),
    (rb"GGUF|lmgg|fmgg|tjgg|algg|24ka", Foreign("gguf", "a GGUF model (llama.cpp's or llama2.c's)")),
    (rb".{4}\0{4}\{\s*\"", Foreign("safetensors", "a safetensors file")),
    (rb"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", Foreign("pickle", f"a pickle of PyTorch's, {_PROGRAM}")),
    (rb"\x80[\4\5]\x95.{5}\0\0\0|\x80[\2\3](c[\w.]+\n|[\]}]q.)", Foreign("pickle", f"a pickle, {_PROGRAM}")),
    (rb"\x89HDF\r\n\x1a\n", Foreign("hdf5", "an HDF5 file")),
    (rb"SQLite format 3\0", Foreign("sqlite", "an SQLite database")),
    (rb"\x7fELF", Foreign("program", "a program")),
    (rb"%PDF-", Foreign("pdf", "a PDF")),
    (rb"\{\\rtf", Foreign("document", "an RTF document")),
    (rb"\xd0\xcf\x11\xe0", Foreign("document", "an old Office document")),
    (rb"\x89PNG\r\n|\xff\xd8\xff[\xdb\xe0\xe1\xe2\xee]|GIF8[79]a", Foreign("image", "an image")),
    (rb"RIFF.{4}(WAVE|WEBP|AVI )|ID3[\2-\4]\0", Foreign("sound", "an image, a sound or a film")),
)  # fmt: skip
_PATTERNS = [(re.compile(pattern, re.DOTALL), found) for pattern, found in _BEGINNINGS]


def foreign(head: bytes) -> Foreign | None:
    """Return the format of a file with these first HEAD_BYTES, or None."""
    return next((found for pattern, found in _PATTERNS if pattern.match(head)), None)
