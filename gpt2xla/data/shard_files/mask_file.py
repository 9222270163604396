"""The file beside a shard that says which of its tokens are trained on: one bit a token, the first in the highest bit of the
first byte, as `np.packbits` writes it. The bits after the last token are 0."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpt2xla.errors import InputError

MASK_SUFFIX = ".mask"


def mask_of(shard: str) -> str:
    """`shard_000000.npy` -> `shard_000000.mask`."""
    return str(Path(shard).with_suffix(MASK_SUFFIX))


def open_mask(file: Path, tokens: int, manifest: str) -> np.ndarray:
    """Return the bytes of the mask of a shard of so many tokens, memory-mapped. Raises InputError if it does not fit."""
    fix = "copy or prepare the data again"
    if not file.exists():
        raise InputError(f"{file}, the mask of a shard, is missing although {manifest} names it; {fix}")
    size, expected = file.stat().st_size, -(-tokens // 8)
    if size != expected:
        raise InputError(f"{file} holds {size} bytes, but the mask of {tokens} tokens has {expected}; {fix}")
    return np.asarray(np.memmap(file, np.uint8, mode="r"))  # slicing an np.memmap costs ten times as much


def read_bits(mask: np.ndarray, start: int, count: int) -> np.ndarray:
    """Return for tokens start .. start + count - 1 whether they are trained on, as bool (count,)."""
    first = start // 8
    bits = np.unpackbits(mask[first : -(-(start + count) // 8)])[start - 8 * first :]
    return bits[:count].view(np.bool_)


class MaskWriter:
    """Writes a mask as tokens come. `trained` counts the bits that are 1."""

    def __init__(self, file: Path) -> None:
        self.file, self.trained = file, 0
        self._stream: BinaryIO = file.open("wb")
        self._rest = np.zeros(0, dtype=np.bool_)  # bits that do not fill a byte yet

    def add(self, trained: np.ndarray) -> None:
        self.trained += int(np.count_nonzero(trained))
        bits = np.concatenate([self._rest, trained])
        whole = len(bits) // 8 * 8
        self._stream.write(np.packbits(bits[:whole]).data)
        self._rest = bits[whole:]

    def close(self) -> None:
        """Write the last bits, and bring all to the disk."""
        self._stream.write(np.packbits(self._rest).data)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
