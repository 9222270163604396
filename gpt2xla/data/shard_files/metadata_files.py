"""Types of headerless token ids, read from the files that their writers put beside them.

Each function returns None if there is no such file, and raises InputError or ValueError if it does not fit.
"""

from __future__ import annotations

import csv
import gzip
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2xla.data.shard_files.first_bytes import HEAD_BYTES
from gpt2xla.data.shard_files.foreign_shards import foreign_format
from gpt2xla.errors import InputError

# Megatron's and lit-gpt's; 6 and 7 are floats.
CODED_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_UNSIGNED = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}  # by the bytes of an id


class Layout(NamedTuple):
    """How ids are stored: the format's name, the type of an id, and their number."""

    format: str
    dtype: str
    tokens: int


def megatron(file: Path) -> Layout | None:
    """Read `NAME.idx`: magic, version, dtype code, numbers of sequences and documents, then for each sequence its length
    (int32) and place (int64), for each document its end (int64). Source: Megatron-LM, core/datasets/indexed_dataset.py."""
    index = next((name for name in (file.with_suffix(".idx"), Path(f"{file}.idx")) if name.exists()), None)
    if index is None:
        return None
    with index.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    size = index.stat().st_size
    if not head.startswith(b"MMIDIDX\0\0"):
        if head.startswith(b"TNTIDX\0\0"):
            what = "an index of fairseq's and Megatron's old format; make both again with --dataset-impl mmap"
        else:
            what = foreign_format(head, size) or "not a Megatron index; if it does not belong to the .bin, move it away"
        raise InputError(f"{index} beside {file.name} is {what}")
    if size < 34:
        raise InputError(f"{index} is a Megatron index that is cut short; copy it again")
    version, code, sequences, documents = struct.unpack_from("<QBQQ", head, 9)
    if version != 1 or code not in CODED_DTYPES or size != 34 + 12 * sequences + 8 * documents:
        raise InputError(
            f"{index} is a Megatron index of {size} bytes, version {version}, dtype code {code}, {sequences} sequences and "
            f"{documents} documents: damaged, multimodal, fairseq's or not of integers; copy both files or make them again"
        )
    lengths = np.fromfile(index, "<i4", sequences, offset=34)
    return Layout("Megatron", CODED_DTYPES[code], int(lengths.sum(dtype=np.int64)))


def datatrove(file: Path) -> Layout | None:
    """Read `NAME.ds.metadata`, text lines (tokenizer|bytes of an id; number of ids), and `NAME.ds.index`, documents' ends as
    uint64. Older metadata lack the bytes of an id. Source: datatrove, pipeline/tokens/tokenizer.py."""
    index, metadata, loss = (file.with_name(file.name + end) for end in (".index", ".metadata", ".loss"))
    if loss.exists():
        raise InputError(f"{loss} masks tokens of the loss, which is not supported; remove it to train on all tokens")
    counts, width = [], ""
    if metadata.exists():
        tokenizer, count, *_ = metadata.read_text(encoding="utf-8").splitlines()
        width = tokenizer.rpartition("|")[2] if "|" in tokenizer else ""
        counts.append(int(count))
    if index.exists():
        counts.append(int(np.fromfile(index, "<u8")[-1]))
    if not counts:
        return None
    size = file.stat().st_size
    bytes_of_id = int(width) if width.isdecimal() else size // max(counts[0], 1)
    if bytes_of_id not in (2, 4) or any(size != count * bytes_of_id for count in counts):
        raise InputError(
            f"{file} of {size} bytes is not what .metadata and .index beside it say ({' and '.join(map(str, counts))} ids"
            f"{f' of {width} bytes' if width else ''}); copy all of them again"
        )
    return Layout("datatrove", _UNSIGNED[bytes_of_id], counts[0])


def dolma(file: Path) -> Layout | None:
    """Read `NAME.csv.gz`, a row per document that begins with its start and end in tokens. Source: dolma,
    tokenizer/memmap_writer.py and data_types.py."""
    rows = file.with_suffix(".csv.gz")
    if not rows.exists():
        return None
    last = b""
    with gzip.open(rows) as stream:
        for line in stream:
            last = line.strip() or last
    fields = next(csv.reader([last.decode("utf-8")]), [])
    size = file.stat().st_size
    if len(fields) < 2 or not fields[1].isdecimal() or (width := size / max(int(fields[1]), 1)) not in _UNSIGNED:
        raise InputError(f"{file} of {size} bytes is not what {rows.name} beside it says; copy both again")
    return Layout("dolma", _UNSIGNED[int(width)], int(fields[1]))
