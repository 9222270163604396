"""Compressed files, recognised by their first bytes: gzip, bzip2, xz, zstd and lz4, also one within another.

Several members or frames in one file are read one after the other. Every decoder here raises an error if a stream ends too
early or if something else follows it. Arrow's decoders are used for speed, the standard library's for xz, which Arrow lacks.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from gpt2xla.errors import InputError, in_one_line

HEAD_BYTES = 64 << 10
_MOST_LAYERS = 2
_CODECS = {
    b"\x1f\x8b\x08": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # data, or the end
# Frames that decoders of zstd and lz4 skip; pzstd begins files with one.
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn the errors of Arrow and the decoders inside the block into an InputError about the file `name`."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or in_one_line(error)
        raise InputError(f"{name} cannot be read ({reason}); fix it, or copy or make it again") from None


def layers_of(file: Path, name: str) -> tuple[str, ...]:
    """Return the codecs that wrap the content, the outermost first. Raises InputError for too many, or if it is cut off."""
    layers: tuple[str, ...] = ()
    while codec := _codec(head(file, layers), name):
        layers = (*layers, codec)
        if len(layers) > _MOST_LAYERS:
            raise InputError(f"{name} is compressed more than {_MOST_LAYERS} times over; decompress it first")
    return layers


def head(file: Path, layers: tuple[str, ...]) -> bytes:
    """Return the first bytes of the content, decompressed."""
    with opened(file, layers) as stream:
        return stream.read(HEAD_BYTES)


@contextlib.contextmanager
def opened(file: Path, layers: tuple[str, ...]) -> Iterator[pa.NativeFile]:
    """Open the content as a stream. Arrow's readers with their own threads cannot use it: they hang if it is damaged."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(pa.input_stream(str(file), compression=None))
        for codec in layers:
            if codec == "xz":
                stream = pa.PythonFile(io.BufferedReader(_Xz(stream)), mode="r")
            else:
                stream = stack.enter_context(pa.CompressedInputStream(stream, codec))
        yield stream


class _Xz(io.RawIOBase):
    """Streams of xz, one after another, with zeros between them. lzma.open would end silently at zeros or damage after a
    stream, and leave out the rest."""

    def __init__(self, source: pa.NativeFile) -> None:
        self._source, self._decoder = source, lzma.LZMADecompressor(lzma.FORMAT_XZ)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            packed = b""
            if self._decoder.eof:
                packed = self._decoder.unused_data.lstrip(b"\0")
                while not packed and (chunk := self._source.read(HEAD_BYTES)):
                    packed = chunk.lstrip(b"\0")
                if not packed:
                    return 0
                self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            elif self._decoder.needs_input and not (packed := self._source.read(HEAD_BYTES)):
                raise EOFError("Truncated compressed stream")
            if content := self._decoder.decompress(packed, len(buffer)):
                buffer[: len(content)] = content
                return len(content)


def _codec(content: bytes, name: str) -> str | None:
    """Return what the content is compressed with, or None."""
    at = skipped = 0
    while len(content) >= at + 8 and struct.unpack_from("<I", content, at)[0] in _SKIPPABLE:
        skipped += 1
        at += 8 + struct.unpack_from("<I", content, at + 4)[0]
    for magic, codec in _CODECS.items():
        if content.startswith(magic, at) and (codec != "bz2" or _is_bzip2(content)):
            return codec
        if 1 < len(content) < len(magic) and magic.startswith(content) and not content.isalnum():
            raise InputError(f"{name} is cut off after {len(content)} bytes; copy or make it again")
    return "zstd" if skipped else None


def _is_bzip2(content: bytes) -> bool:
    """Tell whether the content is bzip2: its first three letters may also begin a text."""
    return len(content) > 4 and any(block.startswith(content[4:10]) for block in _BZIP2_BLOCKS)
