"""Files of other programs: read with their real type, or refused by name; never as other ids than those written."""

import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import tempfile
import zipfile
from bz2 import compress as bzip2
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data.shard_writers import (
    IDS,
    LARGE,
    WEIGHTS,
    datatrove,
    dolma,
    lit_gpt,
    llmc,
    megatron,
    megatron_index,
    npy,
    put,
    raw,
    without,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gpt2xla.data.shard_files.shard_format import Shard, open_shard
from gpt2xla.data.shards import TokenStream
from gpt2xla.errors import InputError

TINY = np.arange(100)
READ = {
    "nanoGPT": (IDS, "raw uint16", {"train.bin": raw(IDS)}),
    "nanoGPT, characters": (IDS % 65, "raw uint16", {"train.bin": raw(IDS % 65)}),
    "nanoGPT, four letters": (IDS % 4, "raw uint16", {"train.bin": raw(IDS % 4)}),
    "nanoGPT, bytes": (IDS % 257, "raw uint16", {"train.bin": raw(IDS % 257)}),
    "nanoGPT, an even place left over": (IDS[:-1], "raw uint16", {"train.bin": raw(IDS[:-1])}),
    "nanoGPT, upper case": (IDS, "raw uint16", {"TRAIN.BIN": raw(IDS)}),
    "numpy": (IDS, "numpy", {"a.npy": npy(IDS)}),
    "numpy int64": (LARGE, "numpy", {"a.npy": npy(LARGE, "<i8")}),
    "numpy big-endian": (LARGE, "numpy", {"a.npy": npy(LARGE, ">i4")}),
    "numpy uint8": (IDS % 256, "numpy", {"a.npy": npy(IDS % 256, "u1")}),
    "numpy under .bin": (LARGE, "numpy", {"a.bin": npy(LARGE, "<u4")}),
    "llm.c": (IDS, "llm.c", {"a.bin": llmc(IDS)}),
    "llm.c, llama-3": (LARGE, "llm.c", {"a.bin": llmc(LARGE, 20240801, 7, "<u4")}),
    "llm.c under .npy": (IDS, "llm.c", {"a.npy": llmc(IDS)}),
    "lit-gpt": (IDS, "lit-gpt", {"a.bin": lit_gpt(IDS)}),
    "lit-gpt int32": (LARGE, "lit-gpt", {"a.bin": lit_gpt(LARGE, "<i4")}),
    "Megatron": (IDS, "Megatron", megatron(IDS)),
    "Megatron int32": (IDS, "Megatron", megatron(IDS, "<i4")),
    "Megatron int64": (LARGE, "Megatron", megatron(LARGE, "<i8")),
    "Megatron uint8": (TINY, "Megatron", megatron(TINY, "u1")),
    "Megatron int16": (TINY, "Megatron", megatron(TINY, "<i2")),
    "Megatron, as text looks": (np.full(50, 0x6161), "Megatron", megatron(np.full(50, 0x6161))),
    "datatrove": (IDS, "datatrove", datatrove(IDS)),
    "datatrove uint32": (LARGE, "datatrove", datatrove(LARGE, "<u4")),
    "datatrove uint32 of small ids": (IDS, "datatrove", datatrove(IDS, "<u4")),
    "datatrove, older": (IDS, "datatrove", datatrove(IDS, "<u2", "gpt2\n{count}\n6 kT")),
    "datatrove, index alone": (IDS, "datatrove", without(datatrove(IDS, "<u4"), "a.ds.metadata")),
    "datatrove, metadata alone": (IDS, "datatrove", without(datatrove(IDS, "<u4"), "a.ds.index")),
    "dolma": (IDS, "dolma", dolma(IDS)),
    "dolma uint32": (LARGE, "dolma", dolma(LARGE, "<u4")),
}


@pytest.mark.parametrize(("ids", "name", "files"), READ.values(), ids=READ)
def test_read_with_its_real_type(ids: np.ndarray, name: str, files: dict[str, bytes], tmp_path: Path) -> None:
    stream = TokenStream(put(tmp_path, files))
    assert stream.format == name
    assert stream.read(0, stream.length).astype(np.int64).tolist() == ids.tolist()
    assert not stream.notes


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a", raw(IDS))
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return stream.getvalue()


def torch_file(is_zip: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(9)}, stream, _use_new_zipfile_serialization=is_zip)
    return stream.getvalue()


def safetensors() -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        save_file({"a": np.ones(9, np.float32)}, file.name)
        return Path(file.name).read_bytes()


def arrow(is_stream: bool) -> bytes:
    import pyarrow

    sink = io.BytesIO()
    table = pyarrow.table({"text": ["a", "b"]})
    with (pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def two_arrays() -> bytes:
    return npy(IDS) + npy(IDS)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"6e" * 32 + b"\nsize 200001024\n"
LITDATA = struct.pack("<4I", 2, 16, 20, 24) + raw(IDS[:4])
REFUSED: dict[str, tuple[str, dict[str, bytes]]] = {
    "int32": ("looks like int32 ids.*np.fromfile", {"a.bin": raw(IDS, "<i4")}),
    "int32, one id": ("looks like int32", {"a.bin": raw(IDS[1:2], "<i4")}),
    "uint32 beyond 65,535": ("looks like int32", {"a.bin": raw(LARGE, "<u4")}),
    "int32 with negative ones": ("looks like int32", {"a.bin": raw(np.where(IDS < 9, -100, IDS), "<i4")}),
    "int64": ("looks like int64", {"a.bin": raw(IDS, "<i8")}),
    "big-endian int32": ("looks like big-endian int32", {"a.bin": raw(IDS, ">i4")}),
    "big-endian int64": ("looks like big-endian int64", {"a.bin": raw(IDS, ">i8")}),
    "big-endian uint16": ("looks like big-endian uint16", {"a.bin": raw(IDS, ">u2")}),
    "big-endian characters": ("looks like big-endian uint16", {"a.bin": raw(IDS % 65, ">u2")}),
    "fp16 weights": ("looks like fp16 or bf16 numbers", {"a.bin": raw(WEIGHTS, "<f2")}),
    "bf16 weights": ("looks like fp16 or bf16 numbers", {"a.bin": raw(WEIGHTS.view("<u4") >> 16, "<u2")}),
    "uint8": ("looks like uint8", {"a.bin": raw(IDS % 65, "u1")}),
    "zeros": ("never written whole", {"a.bin": bytes(20_000)}),
    "zeros at the end": ("never written whole", {"a.bin": raw(IDS) + bytes(10_000)}),
    "odd": ("11999 bytes are not whole", {"a.bin": raw(IDS)[:-1]}),
    "empty": ("0 bytes are not whole", {"a.bin": b""}),
    "LFS pointer": ("Git LFS pointer; run `git lfs pull`", {"a.bin": POINTER}),
    "LFS pointer .npy": ("Git LFS pointer", {"a.npy": POINTER}),
    "LFS pointer .ds": ("Git LFS pointer", {"a.ds": POINTER}),
    "LFS pointers .bin and .idx": ("Git LFS pointer", {"a.bin": POINTER, "a.idx": POINTER}),
    "LFS pointer .idx": (r"a\.idx.*Git LFS pointer", megatron(IDS, "<i4") | {"a.idx": POINTER}),
    "LFS pointer manifest": ("manifest.json is not .* Git LFS pointer", {"a.npy": npy(IDS), "manifest.json": POINTER}),
    "git-annex pointer": ("git-annex", {"a.bin": b"/annex/objects/SHA256E-s20--6e.bin\n"}),
    "gzip": ("gzip", {"a.bin": gzip.compress(raw(IDS))}),
    "bzip2": ("bzip2", {"a.bin": bzip2(raw(IDS))}),
    "xz": ("xz", {"a.bin": lzma.compress(raw(IDS))}),
    "zstd": ("zstd", {"a.bin": b"\x28\xb5\x2f\xfd" + raw(IDS)}),
    "lz4": ("lz4", {"a.bin": b"\x04\x22\x4d\x18" + raw(IDS)}),
    "zip": ("zip archive", {"a.bin": zipped()}),
    "npz": ("zip archive", {"a.npy": zipped()}),
    "tar": ("archive", {"a.bin": tarred()}),
    "PyTorch": ("zip archive .or an Office, EPUB, .npz or .pt file", {"pytorch_model.bin": torch_file(True)}),
    "PyTorch, old": ("PyTorch", {"optimizer.bin": torch_file(False)}),
    "safetensors": ("safetensors", {"a.bin": safetensors()}),
    "Arrow stream": ("Arrow", {"a.bin": arrow(True)}),
    "Arrow file": ("Arrow", {"a.bin": arrow(False)}),
    "parquet": ("parquet", {"a.bin": b"PAR1" + raw(IDS)}),
    "GGUF": ("llama.cpp", {"a.bin": b"GGUF\3\0\0\0" + raw(IDS)}),
    "ELF": ("a program", {"a.bin": b"\x7fELF" + raw(IDS)}),
    **{f"pickle {p}": ("pickle", {"a.bin": pickle.dumps({"a": [1] * 99}, p)}) for p in range(2, 6)},
    "text": ("is text", {"a.bin": "Die Größe, 大きさ".encode() * 999}),
    "JSON": ("is text", {"a.bin": b'{"text": "one"}\n' * 99}),
    "UTF-16": ("is text", {"a.bin": "one two".encode("utf-16") * 1}),
    "llm.c checkpoint": ("llm.c model checkpoint", {"gpt2_124M.bin": llmc(IDS, 20240326, 3)}),
    "llm.c tokenizer": ("llm.c tokenizer", {"gpt2_tokenizer.bin": llmc(IDS, 20240328)}),
    "llm.c evaluation": ("HellaSwag", {"hellaswag_val.bin": llmc(IDS, 20240522)}),
    "llm.c of the future": ("unknown kind", {"a.bin": llmc(IDS, 20271231, 3)}),
    "llm.c cut short": ("promises 6000 tokens but 5999 follow", {"a.bin": llmc(IDS)[:-2]}),
    "llm.c cut in its header": ("promises 6000 tokens but 0 follow", {"a.bin": llmc(IDS)[:500]}),
    "lit-gpt cut short": ("promises 6000 tokens but 5999 follow", {"a.bin": lit_gpt(IDS)[:-2]}),
    "lit-gpt floats": ("dtype code 7", {"a.bin": lit_gpt(IDS, "<f4")}),
    "lit-gpt version 2": ("version 2", {"a.bin": lit_gpt(IDS, version=2)}),
    "lit-llama, early": ("early lit-llama", {"a.bin": b"LITPKDDS" + raw(IDS)}),
    "litdata": ("litdata", {"chunk-0-0.bin": LITDATA}),
    "litdata by its index": ("litdata", {"index.json": json.dumps({"chunks": []}).encode(), "chunk-0-0.bin": raw(IDS)}),
    "Megatron floats": ("dtype code 7", {"a.bin": raw(IDS, "<f4"), "a.idx": megatron_index(IDS, "<f4")}),
    "Megatron version 2": ("version 2", {"a.bin": raw(IDS), "a.idx": megatron_index(IDS, version=2)}),
    "Megatron of another type": ("promises 6000 tokens", {"a.bin": raw(IDS, "<i4"), "a.idx": megatron_index(IDS)}),
    "Megatron cut short": ("promises 6000 tokens", megatron(IDS) | {"a.bin": raw(IDS[:-1])}),
    "Megatron index cut short": ("damaged", megatron(IDS) | {"a.idx": megatron_index(IDS)[:-1]}),
    "Megatron header cut short": ("cut short", megatron(IDS) | {"a.idx": megatron_index(IDS)[:20]}),
    "Megatron index of zeros": ("version 0, dtype code 0", megatron(IDS) | {"a.idx": b"MMIDIDX" + bytes(52)}),
    "Megatron, negative": ("holds -1 to 49 as ids", megatron(np.arange(-1, 50), "<i4")),
    "Megatron, old": ("TNTIDX|old format", megatron(IDS) | {"a.idx": b"TNTIDX\0\0" + bytes(99)}),
    "another .idx": ("not a Megatron index", megatron(IDS) | {"a.idx": bytes(99)}),
    "datatrove alone": ("ids of an unknown type", {"a.ds": raw(IDS)}),
    "datatrove cut short": ("is not what .metadata", datatrove(IDS) | {"a.ds": raw(IDS[:-1])}),
    "datatrove at odds": ("6000 and 5990 ids", datatrove(IDS) | {"a.ds.index": raw(np.array([5990]), "<u8")}),
    "datatrove of another type": ("is not what", datatrove(IDS) | {"a.ds": raw(IDS, "<u4")}),
    "datatrove damaged": ("cannot be read", datatrove(IDS) | {"a.ds.metadata": b""}),
    "datatrove with masks": ("masks tokens", datatrove(IDS) | {"a.ds.loss": bytes(6000)}),
    "dolma alone": ("ids of an unknown type", {"a.npy": raw(IDS)}),
    "dolma cut short": ("is not what a.csv.gz", dolma(IDS) | {"a.npy": raw(IDS[:-1])}),
    "dolma damaged": ("is not what a.csv.gz", dolma(IDS) | {"a.csv.gz": gzip.compress(b"")}),
    "dolma no gzip": ("cannot be read", dolma(IDS) | {"a.csv.gz": b"0,6000,a,b,1\n"}),
    "numpy negative": ("holds -1 to 49 as ids", {"a.npy": npy(np.arange(-1, 50), "<i4")}),
    "numpy beyond 2^31": ("as ids", {"a.npy": npy(np.array([1, 2**31]), "<i8")}),
    "numpy float": ("float64", {"a.npy": npy(IDS, "<f8")}),
    "numpy bool": ("bool", {"a.npy": npy(IDS, "?")}),
    "numpy rows": (r"shape \(2, 3000\)", {"a.npy": npy(IDS.reshape(2, -1))}),
    "numpy fields": ("shape", {"a.npy": npy(IDS, "i4,i4")}),
    "numpy twice": ("promises 12000 bytes but 24128 follow", {"a.npy": two_arrays()}),
    "two formats": ("two formats: a.bin .raw uint16. and b.bin .llm.c", {"a.bin": raw(IDS), "b.bin": llmc(IDS)}),
    "two suffixes": ("may be the same tokens", {"a.bin": raw(IDS), "a.npy": npy(IDS)}),
    "compressed beside": ("would be left out", {"a.npy": npy(IDS), "b.npy.gz": gzip.compress(npy(IDS))}),
    "downloads beside": ("would be left out", {"a.bin": raw(IDS), "a.bin.aria2": b"1"}),
    "splits and others": ("shards of several splits", {"train.bin": raw(IDS), "val.bin": raw(IDS), "x.bin": raw(IDS)}),
    "val and others": ("shards of several splits", {"val.bin": raw(IDS), "x.bin": raw(IDS)}),
    "both in a name": ("of two splits", {"train_val.bin": raw(IDS), "val.bin": raw(IDS), "x.bin": raw(IDS)}),
}


@pytest.mark.parametrize(("message", "files"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name_in_one_line(message: str, files: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        TokenStream(put(tmp_path, files))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_padding_of_lit_gpt_is_read_and_noted(tmp_path: Path) -> None:
    stream = TokenStream(put(tmp_path, {"a.bin": lit_gpt(np.append(IDS, [50_256] * 2000))}))
    assert stream.read(6000, 2000).tolist() == [50_256] * 2000
    assert "ends in 2,000 times id 50256" in stream.notes[0]


WRITERS: dict[str, tuple[str, Callable[[np.ndarray], bytes]]] = {
    "npy": (".npy", npy),
    "npy int32": (".npy", lambda ids: npy(ids, "<i4")),
    "llm.c": (".bin", llmc),
    "lit-gpt": (".bin", lambda ids: lit_gpt(ids, "<i4")),
    "int32": (".bin", lambda ids: raw(ids, "<i4")),
    "int64": (".bin", lambda ids: raw(ids, "<i8")),
    "uint16": (".bin", raw),
}


def opened(file: Path, content: bytes) -> Shard | None:
    """None where it is refused, in one line that names the folder."""
    file.write_bytes(content)
    try:
        return open_shard(file)
    except InputError as error:
        line = str(error)
    assert str(file.parent) in line
    assert "\n" not in line
    return None


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    ids=st.lists(st.integers(0, 60_000), min_size=1, max_size=40),
    writer=st.sampled_from(sorted(WRITERS)),
    suffix=st.sampled_from([".npy", ".bin", ".ds", ""]),
    end=st.one_of(st.none(), st.integers(0, 50), st.integers(0, 1300)),
)
def test_cut_and_renamed_files_never_give_other_ids(ids: list[int], writer: str, suffix: str, end: int | None) -> None:
    """Right: the ids written, or for uint16 without a header, which nothing tells when it is cut at an even place, the first
    of them. All else that is read is wrong. Left out: cuts that leave two bytes, which are one uint16 whatever they were."""
    own, write = WRITERS[writer]
    content = write(np.array(ids))[:end]
    assume(len(content) != 2)
    with tempfile.TemporaryDirectory() as folder:
        shard = opened(Path(folder, f"a{suffix or own}"), content)
    if shard:
        assert shard.tokens.tolist() == (ids[: len(content) // 2] if writer == "uint16" else ids)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    content=st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda start, rest: start + rest,
            st.sampled_from(
                [npy(TINY)[:128], llmc(TINY)[:1024], lit_gpt(TINY)[:24], b"\x93NUMPY", b"LITPKDS", b"PK\3\4"]
            ),
            st.binary(max_size=300),
        ),
    ),
    companion=st.one_of(st.binary(max_size=80), st.builds(lambda rest: b"MMIDIDX\0\0" + rest, st.binary(max_size=80))),
    has_companion=st.booleans(),
    suffix=st.sampled_from([".npy", ".bin", ".ds"]),
)
def test_random_bytes_are_plain_uint16_or_refused(
    content: bytes, companion: bytes, has_companion: bool, suffix: str
) -> None:
    """Right: a `.bin` alone as little-endian uint16, or what its own header promises in full."""
    with tempfile.TemporaryDirectory() as folder:
        if has_companion:
            ends = {".npy": "a.csv.gz", ".bin": "a.idx", ".ds": "a.ds.index"}
            Path(folder, ends[suffix]).write_bytes(companion)
        shard = opened(Path(folder, f"a{suffix}"), content)
    if shard is None:
        return
    if shard.format == "raw uint16":
        assert suffix == ".bin"
        assert not has_companion
        assert shard.tokens.tobytes() == content
    else:
        assert content.endswith(shard.tokens.tobytes())
        assert len(content) - shard.tokens.nbytes in {"numpy": (128,), "llm.c": (1024,), "lit-gpt": (24,)}.get(
            shard.format, (0,)
        )
