#!/usr/bin/env python
"""How fast batches come out of token shards on one core: our loader, in order and shuffled, beside the two usual ways.

    python benchmarks/loader.py

200 million random uint16 tokens lie in shards of odd sizes, all in the page cache. Each round reads them once with each
loader, one after another, so that all see the same machine. Rates and the slowest batch are given by the wall clock, which
other programs on the machine disturb, and by the CPU time of the reading thread, which they hardly do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy as np
import torch

from gpt2xla.data.batch_plan import BatchPlan, Phase
from gpt2xla.data.mixture import Mixture
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.windows import TrainingOrder, Windows

ROWS, LENGTH, VOCAB = 32, 1024, 50304
RESULTS = Path(__file__).parent / "results"
Pair = tuple[torch.Tensor, torch.Tensor]


def ours(folder: Path, shuffle: bool) -> Iterator[Pair]:
    windows = Windows(TokenStream(folder), LENGTH, VOCAB)
    order = TrainingOrder(
        [windows], Mixture.of([1.0]), BatchPlan((Phase(0, ROWS, 1),)), rank=0, world_size=1, drop_last=False,
        shuffle_seed=1 if shuffle else None,
    )  # fmt: skip
    yield from order.batches(first_step=0)


def whole_shards(folder: Path) -> Iterator[Pair]:
    """A shard at a time is loaded and converted whole, and cut into batches; the rest of a shard is dropped."""
    for file in sorted(folder.glob("*.npy")):
        tokens = torch.from_numpy(np.load(file)).long()
        for start in range(0, len(tokens) - ROWS * LENGTH - 1, ROWS * LENGTH):
            run = tokens[start : start + ROWS * LENGTH + 1]
            yield run[:-1].view(ROWS, LENGTH), run[1:].view(ROWS, LENGTH)


def random_rows(folder: Path) -> Iterator[Pair]:
    """Each row starts anywhere in one memory-mapped file of all tokens, drawn with replacement; rows are then stacked."""
    tokens = np.memmap(folder / "all.raw", dtype=np.uint16, mode="r")
    generator = torch.Generator().manual_seed(1)
    while True:
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,), generator=generator)
        x = torch.stack([torch.from_numpy(tokens[i : i + LENGTH].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + LENGTH].astype(np.int64)) for i in starts])
        yield x, y


LOADERS: dict[str, Callable[[Path], Iterator[Pair]]] = {
    "ours, in order": lambda folder: ours(folder, shuffle=False),
    "whole shards, in order": whole_shards,
    "ours, --shuffle": lambda folder: ours(folder, shuffle=True),
    "random memory-mapped rows": random_rows,
}


def write_tokens(folder: Path, count: int) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCAB - 47, count, dtype=np.uint16)
    borders = [count * part // 1000 + 7 for part in (31, 190, 345, 346, 600, 871)]
    for number, part in enumerate(np.split(tokens, borders)):
        np.save(folder / f"{number}.npy", part)
    tokens.tofile(folder / "all.raw")


def measure(loader: Iterator[Pair], batches: int) -> dict[str, float]:
    wall, cpu = np.zeros(batches + 1, dtype=np.int64), np.zeros(batches + 1, dtype=np.int64)
    next(loader)  # opens the files
    wall[0], cpu[0] = time.perf_counter_ns(), time.thread_time_ns()
    read = 0
    for read, _ in enumerate(itertools.islice(loader, batches), start=1):
        wall[read], cpu[read] = time.perf_counter_ns(), time.thread_time_ns()
    result = {"batches": float(read)}
    for name, times in (("wall", np.diff(wall[: read + 1])), ("cpu", np.diff(cpu[: read + 1]))):
        result[f"{name} Mtokens/s"] = read * ROWS * LENGTH / times.sum() * 1e3
        result[f"{name} median us"] = float(np.median(times)) / 1e3
        result[f"{name} slowest ms"] = times.max() / 1e6
        result[f"{name} over 1 ms"] = float((times > 1e6).sum())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", default=str(RESULTS / "loader"), help="written as .json and .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder, options.tokens)
        for _ in range(options.rounds):
            for loader, make in LOADERS.items():
                rounds[loader].append(measure(make(folder), options.tokens // (ROWS * LENGTH) - 2))
    report = {
        "date": date.today().isoformat(),
        "hardware": f"one core of {cpu_name()}",
        "software": f"python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}",
        "tokens": options.tokens,
        "batch": [ROWS, LENGTH],
        "rounds": rounds,
    }
    Path(options.output + ".json").write_text(json.dumps(report, indent=1) + "\n")
    text = as_markdown(report)
    Path(options.output + ".md").write_text(text)
    print(text)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def as_markdown(report: dict) -> str:
    lines = [
        f"# Token loader, {report['date']}, {report['hardware']}",
        "",
        f"{report['tokens']:,} uint16 tokens in the page cache, batches of {ROWS} x {LENGTH}, {report['software']}. "
        f"Medians of {len(next(iter(report['rounds'].values())))} interleaved rounds (least to most).",
        "",
        "| loader | Mtokens per second, wall | Mtokens per CPU second | median batch, us | slowest batch, ms: wall, CPU "
        "| batches over 1 ms of CPU |",
        "|---|---|---|---|---|---|",
    ]
    for name, rounds in report["rounds"].items():

        def of(key: str, rounds: list[dict[str, float]] = rounds) -> np.ndarray:
            return np.array([r[key] for r in rounds])

        rates = [
            f"{np.median(of(key)):.0f} ({of(key).min():.0f} to {of(key).max():.0f})"
            for key in ("wall Mtokens/s", "cpu Mtokens/s")
        ]
        lines.append(
            f"| {name} | {rates[0]} | {rates[1]} | {np.median(of('wall median us')):.1f} | "
            f"{np.median(of('wall slowest ms')):.2f}, {np.median(of('cpu slowest ms')):.2f} | "
            f"{of('cpu over 1 ms').sum():.0f} |"
        )

    def ratio(a: str, b: str) -> str:
        pairs = zip(report["rounds"][a], report["rounds"][b], strict=True)
        return f"{np.median([x['wall Mtokens/s'] / y['wall Mtokens/s'] for x, y in pairs]):.1f}"

    names = list(LOADERS)
    lines += [
        "",
        f"In order, ours is {ratio(names[0], names[1])} times as fast; shuffled, {ratio(names[2], names[3])} times.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
