#!/usr/bin/env python
"""From parquet to finished shards: ours, with and without gigatoken, and the common script, a pool over tiktoken.

    python benchmarks/prepare.py --rounds 3

English text as it lies on a Debian machine, below /usr/share/doc and Python's packages, each file once. Rates are MB of text
per second of CPU time of all processes together, which is what one core does, starting included. Memory is measured on 100
MB and on 1 GB, the latter with repetitions. Writes results/prepare.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import hashlib
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RESULTS = Path(__file__).parent / "results"
SUFFIXES = (".txt", ".rst", ".md", ".html", ".gz", "README", "copyright", "NEWS", "changelog", "TODO")
WAYS = ("ours", "ours without gigatoken", "pool over tiktoken")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=350)
    parser.add_argument("--folders", nargs="+", default=["/usr/share/doc", os.path.dirname(os.__file__)])
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure(options.way, options.corpus)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.parquet") for name in ("speed", "100 MB", "1 GB")}
        size = write_corpus(files["speed"], options.folders, options.megabytes * 10**6)
        write_corpus(files["100 MB"], options.folders, 10**8)
        write_corpus(files["1 GB"], options.folders, 10**9)
        runs = [(way, "speed") for _ in range(options.rounds) for way in WAYS] + [("ours", "100 MB"), ("ours", "1 GB")]
        for way, corpus in runs:
            command = [sys.executable, __file__, "--way", way, "--corpus", str(files[corpus])]
            row = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            rows.append({"way": way, "corpus": corpus, **row})
            print(rows[-1], flush=True)
    assert len({row["sha256"] for row in rows if row["corpus"] == "speed"}) == 1, "all ways write the same tokens"
    lines = table(rows, size)
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "prepare.json").write_text(json.dumps(rows, indent=2) + "\n")
    (RESULTS / "prepare.md").write_text("\n".join(lines) + "\n")


def table(rows: list[dict[str, Any]], size: int) -> list[str]:
    def rate(row: dict[str, Any]) -> float:
        return row["bytes"] / row["cpu_seconds"] / 1e6

    base = statistics.median(rate(row) for row in rows if row["way"] == WAYS[-1])
    lines = ["| | MB/s per core (least to most) | M tokens/s per core | ratio | peak memory |", "|---|---|---|---|---|"]
    for way, corpus in [*((way, "speed") for way in WAYS), ("ours", "100 MB"), ("ours", "1 GB")]:
        chosen = [row for row in rows if (row["way"], row["corpus"]) == (way, corpus)]
        rates = sorted(rate(row) for row in chosen)
        middle = statistics.median(rates)
        tokens = middle * chosen[0]["tokens"] / chosen[0]["bytes"]
        memory = max(row["peak_mib"] for row in chosen)
        name = way if corpus == "speed" else f"{way}, {corpus}"
        lines.append(
            f"| {name} | {middle:.1f} ({rates[0]:.1f} to {rates[-1]:.1f}) | {tokens:.1f} | {middle / base:.1f} "
            f"| {memory:.0f} MiB |"
        )
    today = datetime.datetime.now(tz=datetime.timezone.utc).date()
    machine = f"{os.cpu_count()} cores of {cpu_name()}"
    return [*lines, "", f"{today}, {size / 1e6:.0f} MB of English text, GPT-2's encoding, one worker, {machine}"]


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def write_corpus(file: Path, folders: list[str], size: int) -> int:
    """About `size` bytes of text, repeated where the machine holds less of it. Returns the exact number."""
    written, batch, held = 0, [], 0
    texts = itertools.chain.from_iterable(english(folders) for _ in itertools.count())
    with pq.ParquetWriter(file, pa.schema([("text", pa.string())])) as writer:
        while written < size:
            batch.append(text := next(texts))
            held += len(text.encode())
            if held > 8 << 20 or written + held >= size:
                writer.write_table(pa.table({"text": batch}))
                written, batch, held = written + held, [], 0
    return written


def english(folders: list[str]) -> Iterator[str]:
    seen: set[bytes] = set()
    for folder in folders:
        for root, folders_below, files in os.walk(folder):
            folders_below.sort()
            for name in sorted(files):
                if not name.endswith(SUFFIXES):
                    continue
                try:
                    data = Path(root, name).read_bytes()
                    data = gzip.decompress(data) if name.endswith(".gz") else data
                    text = data.decode()
                except (OSError, ValueError, EOFError):
                    continue
                key = hashlib.sha256(data).digest()
                if key in seen or "\x00" in text:
                    continue
                seen.add(key)
                yield text


def measure(way: str, corpus: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        before, start = cpu_seconds(), time.perf_counter()
        result = (pool if way == WAYS[-1] else ours)(corpus, Path(folder) / "out", way)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
        digest = hashlib.sha256(b"".join(shard.tobytes() for shard in result["shards"])).hexdigest()
    answer = {"bytes": result["bytes"], "tokens": result["tokens"], "sha256": digest}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak, **answer}))


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ours(corpus: Path, output: Path, way: str) -> dict[str, Any]:
    if way != "ours":
        sys.modules["gigatoken"] = None  # type: ignore[assignment]
    from gpt2xla.data.documents.corpus import local_parts
    from gpt2xla.data.preparation.pipeline import PrepareConfig, prepare
    from gpt2xla.data.tokenizer import load_tokenizer

    config = PrepareConfig(output_dir=str(output), num_workers=1, test_fraction=1e-9, test_tokens=1)
    parts = local_parts([corpus])
    parts = [*parts, *one_document(output.parent)]  # test/ must hold something
    manifest = prepare(parts, load_tokenizer("gpt2"), config)["train"]
    shards = [np.load(output / "train" / shard.file, mmap_mode="r") for shard in manifest.shards]
    return {"bytes": manifest.bytes, "tokens": manifest.tokens, "shards": shards}


def one_document(folder: Path) -> list[Any]:
    import dataclasses

    from gpt2xla.data.documents.corpus import local_parts

    (folder / "test.txt").write_text("test")
    return [dataclasses.replace(local_parts([folder / "test.txt"])[0], split="test")]


def pool(corpus: Path, output: Path, way: str) -> dict[str, Any]:
    output.mkdir()
    shard, filled, shards, size = np.empty(100_000_000, dtype=np.uint16), 0, [], 0

    def texts() -> Iterator[str]:
        nonlocal size
        for batch in pq.ParquetFile(corpus).iter_batches(1024, columns=["text"]):
            for text in batch.column(0).to_pylist():
                if text:
                    size += len(text.encode())
                    yield text

    with Pool(1) as workers:
        for tokens in workers.imap(tokenize, texts(), chunksize=16):
            while len(tokens):
                part = tokens[: len(shard) - filled]
                shard[filled : filled + len(part)] = part
                filled += len(part)
                tokens = tokens[len(part) :]
                if filled == len(shard):
                    np.save(output / f"{len(shards)}.npy", shard)
                    shards.append(np.load(output / f"{len(shards)}.npy", mmap_mode="r"))
                    filled = 0
    np.save(output / f"{len(shards)}.npy", shard[:filled])
    shards.append(np.load(output / f"{len(shards)}.npy", mmap_mode="r"))
    return {"bytes": size, "tokens": sum(map(len, shards)), "shards": shards}


def tokenize(text: str) -> np.ndarray:
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    return np.array([*encoding.encode_ordinary(text), encoding.eot_token], dtype=np.uint16)


if __name__ == "__main__":
    main()
