"""The same few texts in a file of every format, and what becomes of such a file."""

from __future__ import annotations

import bz2
import csv
import dataclasses
import gzip
import io
import itertools
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from gpt2xla.data.documents.corpus import documents_of, local_parts
from gpt2xla.data.preparation.pipeline import PrepareConfig, prepare
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.tokenizer import load_tokenizer

TEXTS = [
    "one",
    'two "quoted", with a comma\nand a line',
    "naïve 漢字 🙂",
    " tab\there; semicolon|bar ",
    "<|endoftext|>, [4] {5}",
]
LINES = ["one", "two", "naïve 漢字 🙂"]
TABLE = pa.table({"id": range(len(TEXTS)), "text": TEXTS})


def by_arrow(codec: str) -> Callable[[bytes], bytes]:
    def compress(content: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(content)
        return bytes(sink.getvalue())

    return compress


def delimited(delimiter: str, texts: list[str] = TEXTS) -> bytes:
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter).writerows([["id", "text"], *([n, text] for n, text in enumerate(texts))])
    return stream.getvalue().encode()


def arrow(kind: str) -> bytes:
    sink = pa.BufferOutputStream()
    new = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[kind]
    with new(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=2)
    return bytes(sink.getvalue())


def parquet(table: pa.Table = TABLE) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


OBJECTS: list[dict[str, Any]] = [{"id": n, "text": text, "more": [n]} for n, text in enumerate(TEXTS)]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": by_arrow("zstd"),
    ".lz4": by_arrow("lz4"),
}  # fmt: skip
CONTAINERS: dict[str, tuple[bytes, list[str]]] = {
    "lines.jsonl": ("".join(json.dumps(o) + "\n" for o in OBJECTS).encode(), TEXTS),
    "lines.json": ("\n".join(json.dumps(o, ensure_ascii=False) for o in OBJECTS).encode(), TEXTS),
    "pretty.jsonl": ("\n".join(json.dumps(o, indent=2) for o in OBJECTS).encode(), TEXTS),
    "objects.json": (json.dumps(OBJECTS, indent=1).encode(), TEXTS),
    "strings.json": (json.dumps(TEXTS).encode(), TEXTS),
    "comma.csv": (delimited(","), TEXTS),
    "semicolon.csv": ("\ufeff".encode() + delimited(";"), TEXTS),
    "tab.tsv": (delimited("\t"), TEXTS),
    "stream.arrow": (arrow("stream"), TEXTS),
    "text.txt": ("\ufeff".encode() + "\r\n\r\n".join(LINES).encode(), LINES),
}
WHOLE: dict[str, tuple[bytes, list[str]]] = {"file.arrow": (arrow("file"), TEXTS), "table.parquet": (parquet(), TEXTS)}
EVERY = CONTAINERS | WHOLE


def read(file: Path, said: list[str] | None = None, **options: Any) -> list[str]:
    said = [] if said is None else said
    return list(documents_of(local_parts([file], say=said.append, **{"split_by": "line"} | options)))


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def prepared(parts: list, output: Path, said: list[str] | None = None) -> list[str]:
    """The documents that the shards hold, by the bytes tokenizer, whose ids are the bytes."""
    config = PrepareConfig(output_dir=str(output), tokenizer="bytes", num_workers=1)
    prepare(parts, load_tokenizer("bytes"), config, (said if said is not None else []).append)
    stream = TokenStream(output / "train")
    assert stream.manifest is not None
    ids = stream.read(0, stream.length).tolist()
    documents = [bytes(group).decode() for is_end, group in itertools.groupby(ids, lambda i: i == 256) if not is_end]
    assert ids.count(256) == stream.manifest.documents == len(documents)
    return documents


def for_train(file: Path, folder: Path, said: list[str], **options: Any) -> list:
    """The file's part for train/, and another for test/."""
    (part,) = local_parts([file], say=said.append, **options)
    (test,) = local_parts([write(folder, "test.txt", b"test")])
    return [dataclasses.replace(part, split="train"), dataclasses.replace(test, split="test")]
