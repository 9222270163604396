"""Writers of token files as other programs write them, in the fewest lines; their sources stand beside the readers."""

import csv
import gzip
import io
import struct
from pathlib import Path

import numpy as np

# As those of text: a few ids often, many seldom, none of the last of GPT-2's.
IDS = (50_257 ** np.random.default_rng(0).random(6000)).astype(np.int64) - 1
LARGE = IDS * 2  # up to 100,000
WEIGHTS = np.random.default_rng(0).normal(0, 0.02, 6000).astype("<f4")
CODES = {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<f8": 6, "<f4": 7, "<u2": 8}  # Megatron's and lit-gpt's


def raw(ids: np.ndarray, dtype: str = "<u2") -> bytes:
    return ids.astype(dtype).tobytes()


def npy(ids: np.ndarray, dtype: str = "<u2") -> bytes:
    stream = io.BytesIO()
    np.save(stream, ids.astype(dtype))
    return stream.getvalue()


def llmc(ids: np.ndarray, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    return header.tobytes() + raw(ids, dtype)


def lit_gpt(ids: np.ndarray, dtype: str = "<u2", version: int = 1) -> bytes:
    return b"LITPKDS" + struct.pack("<QBQ", version, CODES[dtype], len(ids)) + raw(ids, dtype)


def megatron_index(ids: np.ndarray, dtype: str = "<u2", magic: bytes = b"MMIDIDX\0\0", version: int = 1) -> bytes:
    lengths = np.array([10, len(ids) - 10], "<i4")
    places = np.array([0, 10], "<i8") * np.dtype(dtype).itemsize
    documents = np.arange(3, dtype="<i8")
    head = magic + struct.pack("<QBQQ", version, CODES[dtype], len(lengths), len(documents))
    return head + lengths.tobytes() + places.tobytes() + documents.tobytes()


def megatron(ids: np.ndarray, dtype: str = "<u2") -> dict[str, bytes]:
    return {"a.bin": raw(ids, dtype), "a.idx": megatron_index(ids, dtype)}


def datatrove(ids: np.ndarray, dtype: str = "<u2", metadata: str = "gpt2|{width}\n{count}\n6 kT") -> dict[str, bytes]:
    text = metadata.format(width=np.dtype(dtype).itemsize, count=len(ids))
    return {"a.ds": raw(ids, dtype), "a.ds.index": raw(np.array([10, len(ids)]), "<u8"), "a.ds.metadata": text.encode()}


def dolma(ids: np.ndarray, dtype: str = "<u2") -> dict[str, bytes]:
    rows = io.StringIO()
    csv.writer(rows).writerows([(0, 10, "one", "a.json, gz", 1), (10, len(ids), "two", "a.json.gz", 2)])
    return {"a.npy": raw(ids, dtype), "a.csv.gz": gzip.compress(rows.getvalue().encode())}


def without(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name not in names}


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
