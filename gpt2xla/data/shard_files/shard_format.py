"""Opens a file of token ids, or refuses it. Its content and the files beside it decide, not its name.

| format | recognised by | ids |
|---|---|---|
| numpy (ours, build-nanogpt) | its header | one row of integers |
| llm.c, modded-nanogpt | its header | uint16 or uint32 |
| lit-gpt, TinyLlama | its header | integers |
| Megatron-LM, GPT-NeoX: `.bin` | `.idx` beside it | integers |
| datatrove, nanotron: `.ds` | `.ds.index` and `.ds.metadata` beside it | uint16 or uint32 |
| dolma, OLMo: `.npy` without a header | `.csv.gz` beside it | unsigned integers |
| nanoGPT: `.bin` | nothing against it (`foreign_shards.py`, `raw_ids.py`) | uint16 |
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2xla.data.shard_files import metadata_files
from gpt2xla.data.shard_files.first_bytes import HEAD_BYTES
from gpt2xla.data.shard_files.foreign_shards import foreign_format, pointer
from gpt2xla.data.shard_files.raw_ids import against_uint16, sample_blocks
from gpt2xla.errors import InputError, in_one_line

RAW = "raw uint16"
SUFFIXES = (".npy", ".bin", ".ds")
_LLMC_DTYPES = {20240520: "<u2", 20240801: "<u4"}  # by the magic number of the header
_LLMC_HEADER_BYTES = 256 * 4
_LIT_GPT_HEADER_BYTES = 24
_TOO_LARGE = 2**31


class Shard(NamedTuple):
    """An open file of token ids.

    Attributes:
        tokens: integers of shape (T,), memory-mapped.
        format: the name of its format.
        note: a note for the user, or "".
    """

    tokens: np.ndarray
    format: str
    note: str = ""


def open_shard(file: Path) -> Shard:
    """Open a shard. Raises InputError, naming the file, if it is not certainly one of the formats."""
    try:
        shard = _open(file)
    except InputError:
        raise
    except FileNotFoundError:
        what = "links to a file that is not there" if file.is_symlink() else "is missing"
        raise InputError(f"{file} {what}; copy or prepare it again") from None
    except Exception as error:  # numpy parses headers as Python, which fails in many ways
        fix = "it may be cut short: copy or prepare it again"
        raise InputError(f"{file} cannot be read as a shard ({in_one_line(error, 200)}); {fix}") from None
    tokens = np.asarray(shard.tokens)  # slicing an np.memmap costs ten times as much
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise InputError(f"{file} holds {tokens.dtype} of shape {tokens.shape}; a shard is one row of integer ids")
    if tokens.dtype.kind == "i" or tokens.dtype.itemsize > 2:  # a sample here; all are checked when they are read
        for block in sample_blocks(tokens):
            if len(block) and (block.min() < 0 or block.max() >= _TOO_LARGE):
                found = f"{block.min()} to {block.max()}"
                raise InputError(f"{file} holds {found} as ids; it is damaged or of another format")
    return shard._replace(tokens=tokens)


def _open(file: Path) -> Shard:
    with file.open("rb") as stream:
        head, size = stream.read(HEAD_BYTES), os.fstat(stream.fileno()).st_size
    suffix = file.suffix.lower()
    if what := pointer(head):
        raise InputError(f"{file} is {what}")
    if suffix == ".bin" and (layout := metadata_files.megatron(file)):
        return Shard(_map(file, layout.dtype, layout.tokens, size), layout.format)
    if head.startswith(b"\x93NUMPY"):
        return _numpy(file, size)
    if head.startswith(b"LITPKDS"):
        return _lit_gpt(file, head, size)
    if int.from_bytes(head[:4], "little") in _LLMC_DTYPES:
        return _llmc(file, head, size)
    if what := foreign_format(head, size):
        raise InputError(f"{file} is {what}")
    if suffix == ".bin":
        return _nanogpt(file, size)
    layout = metadata_files.datatrove(file) if suffix == ".ds" else metadata_files.dolma(file)
    if layout is None:
        missing = "a .ds.metadata" if suffix == ".ds" else "a header, or dolma's .csv.gz beside it,"
        fix = "copy that too, or convert it: np.save(NEW, np.fromfile(FILE, TYPE)) with '<u2' or '<u4'"
        raise InputError(f"{file} holds ids of an unknown type: {missing} is missing; {fix}")
    return Shard(_map(file, layout.dtype, layout.tokens, size), layout.format)


def _numpy(file: Path, size: int) -> Shard:
    # Not np.load, which would also open a zip of arrays or a pickle.
    tokens = np.lib.format.open_memmap(file, mode="r")
    if tokens.offset + tokens.nbytes != size:
        raise ValueError(f"its header promises {tokens.nbytes} bytes but {size - tokens.offset} follow")
    return Shard(tokens, "numpy")


def _llmc(file: Path, head: bytes, size: int) -> Shard:
    """Read 256 int32 (magic, version, number of ids, zeros), then ids. Versions 1 and 7 have the same layout. Source: llm.c,
    dev/data/data_common.py."""
    magic, _, count = struct.unpack_from("<3i", head)
    return Shard(_map(file, _LLMC_DTYPES[magic], count, size, _LLMC_HEADER_BYTES), "llm.c")


def _lit_gpt(file: Path, head: bytes, size: int) -> Shard:
    """Read magic, version, dtype code, number of ids, ids. The last file is padded with separators, and lit-gpt trains on
    these, too. Source: lit-gpt, lit_gpt/packed_dataset.py."""
    version, code, count = struct.unpack_from("<QBQ", head, 7)
    if version != 1 or code not in metadata_files.CODED_DTYPES:
        raise InputError(f"{file} is packed by lit-gpt as version {version}, dtype code {code}; pack integers again")
    tokens = _map(file, metadata_files.CODED_DTYPES[code], count, size, _LIT_GPT_HEADER_BYTES)
    padding = _equal_at_end(tokens)
    note = f"{file} ends in {padding:,} times id {tokens[-1]}, lit-gpt's padding; it is read, as lit-gpt reads it"
    return Shard(tokens, "lit-gpt", note if padding > 1 else "")


def _nanogpt(file: Path, size: int) -> Shard:
    if size == 0 or size % 2:
        raise ValueError(f"{size} bytes are not whole uint16 ids")
    tokens = np.memmap(file, "<u2", mode="r")
    if what := against_uint16(tokens):
        raise InputError(f"{file} {what}")
    return Shard(tokens, RAW)


def _map(file: Path, dtype: str, count: int, size: int, header: int = 0) -> np.ndarray:
    width = np.dtype(dtype).itemsize
    if size < header or size - header != count * width:
        raise ValueError(f"it promises {count} tokens but {max(0, size - header) / width:.10g} follow")
    return np.memmap(file, dtype, mode="r", offset=header) if count else np.zeros(0, dtype)


def _equal_at_end(tokens: np.ndarray) -> int:
    """Return how many ids at the end are the same."""
    for end in range(len(tokens), 0, -(1 << 20)):
        start = max(0, end - (1 << 20))
        if len(others := np.flatnonzero(tokens[start:end] != tokens[-1])):
            return len(tokens) - start - int(others[-1]) - 1
    return len(tokens)
