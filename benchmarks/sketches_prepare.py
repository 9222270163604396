#!/usr/bin/env python
"""Drawings per second and core of prepare_sketches.py, from both forms in which Quick, Draw! is published.

    python benchmarks/sketches_prepare.py --input full/raw/*.ndjson

Raw drawings are given; the simplified ones are made of them by the recipe of the data set's README. Each form is one file,
with the drawings several times under other key_ids. Seconds are of CPU time of one process: of a worker's two parts alone
(lines to packed pictures; packed pictures to ids), and of the whole command, which also hashes the files, packs rows and
writes. The best of a few rounds counts. Writes results/sketches_prepare.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpt2xla.sketches.buckets import Buckets
from gpt2xla.sketches.encoding import Choice, TokenEncoder
from gpt2xla.sketches.format import SketchFormat
from gpt2xla.sketches.options import SketchesConfig
from gpt2xla.sketches.packed_pictures import Rasteriser
from gpt2xla.sketches.preparation import prepare
from gpt2xla.sketches.sources import find_files, lines_of
from gpt2xla.sketches.tokenizer import train_tokenizer

RESULTS = Path(__file__).parent / "results"
EPSILON = 2.0  # of Ramer-Douglas-Peucker, in the data set's README


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="raw ndjson files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drawings", type=int, default=20_000, help="in the file of each form")
    options = parser.parse_args()
    records = [json.loads(line) for file in options.input for line in file.read_text().splitlines()]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for form, change in (("raw", dict), ("simplified", simplified)):
            file = Path(folder, f"{form}.ndjson")
            write_form(file, list(map(change, records)), options.drawings)
            rows.append(measured(form, file, options.drawings, options.rounds, Path(folder)))
            print(rows[-1], flush=True)
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    title = f"Drawings per second and core (CPU time of one process), {datetime.date.today()}, {machine}"
    lines = [
        f"{title}; {len(records):,} different drawings.", "",
        "| form | bytes each | lines to pictures | with 1 copy each | pictures to ids | both | whole command |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        figures = (row[key] for key in ("pictures", "with_copies", "ids", "both", "command"))
        lines.append(f"| {row['form']} | {row['bytes_each']:,} | " + " | ".join(f"{rate:,}" for rate in figures) + " |")
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sketches_prepare.json").write_text(json.dumps(rows, indent=2) + "\n")
    (RESULTS / "sketches_prepare.md").write_text("\n".join(lines) + "\n")


def write_form(file: Path, records: list[dict[str, Any]], drawings: int) -> None:
    """Write so many drawings: the records, again and again with other keys."""
    with file.open("w") as stream:
        for number in range(drawings):
            record = records[number % len(records)] | {"key_id": str(number)}
            stream.write(json.dumps(record, separators=(",", ":")) + "\n")


def measured(form: str, file: Path, drawings: int, rounds: int, folder: Path) -> dict[str, Any]:
    [given] = find_files([str(file)], (), folder, print)
    blocks = list(lines_of(given))
    rasteriser = [Rasteriser(24, 1, copies, 0, 0.05, (), recognized_only=False) for copies in (0, 1)]
    seconds = [best(lambda work=work: [work(lines, {}) for lines in blocks], rounds) for work in rasteriser]  # type: ignore[misc]
    parts = [rasteriser[0](lines, {}) for lines in blocks]
    words = sorted({word for part in parts for word in part.words})
    buckets = Buckets(folder / f"{form}-buckets")
    for part in parts:
        numbers = np.array([words.index(word) for word in part.words])
        for packed in (part.train, part.test):
            packed["word"] = numbers[packed["word"]]
            buckets.add(packed)
    buckets.close()
    format = SketchFormat(train_tokenizer(dict.fromkeys(words, 1), 24, 1024), 24, words)
    limits = np.full(len(words), 2**64 - 1, dtype=np.uint64)
    encode = TokenEncoder(Choice(24, words, limits, 0.5), format, "all", 1024)
    ids = best(lambda: [encode(bucket) for bucket in buckets.files], rounds)
    outputs = (folder / f"{form}-{number}" for number in range(rounds))
    command = best(lambda: run_command(file, next(outputs)), rounds)
    rates = {
        "pictures": seconds[0],
        "with_copies": seconds[1],
        "ids": ids,
        "both": seconds[0] + ids,
        "command": command,
    }
    each = round(file.stat().st_size / drawings)
    return {"form": form, "drawings": drawings, "bytes_each": each} | {k: round(drawings / s) for k, s in rates.items()}


def run_command(file: Path, output: Path) -> None:
    prepare(SketchesConfig(input=(str(file),), output_dir=str(output), num_workers=1), lambda line: None)


def best(work: Callable[[], object], rounds: int) -> float:
    """Return the CPU seconds of the fastest round."""
    found = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def simplified(record: dict[str, Any]) -> dict[str, Any]:
    """Return a drawing in the simplified form: from 0 to 255, a point for each pixel, then Ramer-Douglas-Peucker."""
    strokes = [np.array(stroke[:2], dtype=float).T for stroke in record["drawing"]]
    points = np.concatenate(strokes)
    low = points.min(axis=0)
    scale = 255 / max((points.max(axis=0) - low).max(), 1e-9)
    drawing = [thinned(resampled((stroke - low) * scale)).round().astype(int).T.tolist() for stroke in strokes]
    return record | {"drawing": drawing}


def resampled(stroke: np.ndarray) -> np.ndarray:
    along = np.append(0.0, np.cumsum(np.hypot(*np.diff(stroke, axis=0).T)))
    places = np.append(np.arange(0.0, along[-1]), along[-1])
    return np.stack([np.interp(places, along, stroke[:, axis]) for axis in (0, 1)], axis=1)


def thinned(stroke: np.ndarray) -> np.ndarray:
    kept = np.zeros(len(stroke), dtype=bool)
    kept[[0, -1]] = True
    spans = [(0, len(stroke) - 1)]
    while spans:
        start, end = spans.pop()
        if end - start < 2:
            continue
        chord, others = stroke[end] - stroke[start], stroke[start + 1 : end] - stroke[start]
        length = np.hypot(*chord)
        away = np.abs(others[:, 0] * chord[1] - others[:, 1] * chord[0]) / length if length else np.hypot(*others.T)
        if away.max() > EPSILON:
            middle = start + 1 + int(away.argmax())
            kept[middle] = True
            spans += [(start, middle), (middle, end)]
    return stroke[kept]


if __name__ == "__main__":
    main()
