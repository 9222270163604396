#!/usr/bin/env python
"""Whether a long run keeps its memory, threads and open files: thousands of small steps with many saves and validations.

    python benchmarks/soak.py soak/torch
    python benchmarks/soak.py soak/xla --runner xla
    python benchmarks/soak.py soak/mirror --steps 5000 --checkpoints-dir file:///tmp/bucket/run -- --num-layers 4

The run is started as a user would start it, and each second /proc tells what it holds. FOLDER gets the run, its output,
samples.csv and samples.png (which needs matplotlib, the extra `plot`). Flags after `--` are passed to the run.

Prints a table. Exit code 1 if something grew by more than 2% over the last half of the steps, or the run failed. Linux only.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2xla.config import GeneralConfig
from gpt2xla.config.paths import is_url
from gpt2xla.logs.sinks import METRICS_FILE

ROOT = Path(__file__).resolve().parent.parent
RUNNERS = {"torch": "run_pretrain.py", "xla": "run_pretrain_xla.py"}
MOST_GROWTH = 2.0  # in percent, over the last half of the steps
# Small on purpose: what is looked for grows with steps and saves, and not with the model.
RUN = """--vocab-size 64 --seq-length 16 --d-model 32 --num-layers 1 --num-heads 2 --train-batch-size 8 --eval-batch-size 8
--gradient-accum-step 1 --valid-steps 6 --learning-rate 0.01 --min-lr 0.001 --warmup-steps 4 --saved-checkpoint-limit 2
--shuffle""".split()


class Sample(NamedTuple):
    """What the processes of a run held at one moment, all of them together."""

    seconds: float
    step: int
    resident_mb: float  # also shared libraries, and pages of files that are mapped
    anonymous_mb: float  # memory that belongs to no file
    peak_mb: float  # the most that was resident so far, as the kernel knows it
    threads: int
    files: int  # open ones
    processes: int


class Row(NamedTuple):
    """One line of the table: a level is the median of a tenth of a half's samples, or what was there at its end."""

    name: str
    levels: tuple[float, float, float, float]  # at the start and end of the first half, and of the last one

    @property
    def growth(self) -> tuple[float, float]:
        """In the first and the last half, in percent."""
        first, middle, middle_again, last = self.levels
        return 100 * (middle / first - 1), 100 * (last / middle_again - 1)

    @property
    def grows(self) -> bool:
        return self.growth[1] > MOST_GROWTH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for the run and the results; must not exist yet")
    parser.add_argument("--runner", choices=RUNNERS, default="torch", help="xla runs on XLA's CPU (default: torch)")
    parser.add_argument("--steps", type=int, default=20_000, help="(default: 20000)")
    parser.add_argument("--every", type=int, default=50, help="steps between saves and validations (default: 50)")
    parser.add_argument("--checkpoints-dir", metavar="URL", help="of the run, such as file:///tmp/bucket/run")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="more flags for the run")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists; name another folder")
    if options.checkpoints_dir and not is_url(options.checkpoints_dir):
        parser.error(f"--checkpoints-dir {options.checkpoints_dir} is no URL; local runs have their folder in FOLDER")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the run ends with this process
    code, samples = soak(options)
    if code:
        output = (options.folder / "output.txt").read_text(errors="replace")
        print(f"the run failed with exit code {code}; the end of {options.folder}/output.txt:\n{output[-2000:]}")
        return 1
    rows = compared(samples)
    print(*table(rows), sep="\n")
    draw(samples, options.folder / "samples.png")
    return int(any(row.grows for row in rows))


def soak(options: argparse.Namespace) -> tuple[int, list[Sample]]:
    """Run to the end. Return the exit code and the samples, which are also written to FOLDER/samples.csv."""
    folder = options.folder.resolve()
    general = GeneralConfig(options.checkpoints_dir or str(folder / "run"), scratch_dir=str(folder / "scratch"))
    where = ["--checkpoints-dir", general.checkpoints_dir, "--scratch-dir", general.scratch_dir]
    steps, every = str(options.steps), str(options.every)
    flags = [
        *RUN, *write_data(folder), *where, "--train-steps", steps, "--decay-steps", steps,
        "--valid-interval", every, "--save-interval", every, *options.flags,
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PJRT_DEVICE": "CPU", "PYTHONPATH": str(ROOT)}
    with (folder / "output.txt").open("w") as output, (folder / "samples.csv").open("w", newline="") as table_file:
        command = [sys.executable, RUNNERS[options.runner], *flags]
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            writer, samples = csv.writer(table_file), []
            writer.writerow(Sample._fields)
            for sample in watched(run, general.folder / METRICS_FILE):
                samples.append(sample)
                writer.writerow(sample)
                table_file.flush()
        finally:
            run.terminate()  # it has ended, unless this process is to end early
            code = run.wait()
    return code, samples


def write_data(folder: Path) -> list[str]:
    """Write tokens that mostly follow from one another. Return the flags that name them."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 6000), ("test", 900)):
        (folder / "data" / name).mkdir(parents=True)
        tokens = np.cumsum(np.where(rng.random(count) < 0.8, 1, rng.integers(0, 64, count))) % 64
        np.save(folder / "data" / name / "000.npy", tokens.astype(np.uint16))
    return ["--train-dir", str(folder / "data" / "train"), "--valid-dir", str(folder / "data" / "test")]


def watched(run: subprocess.Popen[bytes], metrics: Path) -> Iterator[Sample]:
    """Yield a sample each second, from the first update until the run ends."""
    begun = time.monotonic()
    while run.poll() is None:
        step = newest_step(metrics)
        held = [found for process in family(run.pid) if (found := held_by(process))]
        if step and held:
            together = [sum(values) for values in zip(*held, strict=True)]
            resident, anonymous, peak = (kilobytes / 1024 for kilobytes in together[:3])
            yield Sample(
                round(time.monotonic() - begun, 1), step, round(resident, 2), round(anonymous, 2), round(peak, 2),
                together[3], together[4], len(held),
            )  # fmt: skip
        time.sleep(1)


def newest_step(metrics: Path) -> int:
    """Return the step of the last whole line; 0 if there is none yet."""
    try:
        with metrics.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096))
            return int(json.loads(stream.read().splitlines(keepends=True)[-1])["step"])
    except (OSError, ValueError, IndexError):
        return 0


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")")[-1].split()[1])
            except OSError:  # it has ended
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found


def held_by(pid: int) -> tuple[int, int, int, int, int] | None:
    """Return a process's resident, anonymous and highest resident memory in KB, its threads and its open files; None if it
    has ended."""
    process = Path("/proc") / str(pid)
    try:
        now, status = (_numbers(process / name) for name in ("smaps_rollup", "status"))
        return now["Rss"], now["Anonymous"], status["VmHWM"], status["Threads"], len(os.listdir(process / "fd"))
    except (OSError, KeyError):
        return None


def _numbers(file: Path) -> dict[str, int]:
    pairs = (line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    return {name: int(value.split()[0]) for name, value in pairs if value.split() and value.split()[0].isdigit()}


def compared(samples: Sequence[Sample]) -> list[Row]:
    """Return what the samples show of each half of the steps."""
    usual = statistics.mode(sample.processes for sample in samples)
    samples = [sample for sample in samples if sample.processes == usual]  # at the end the launcher is alone
    middle = samples[-1].step / 2
    halves = [
        [sample for sample in samples if sample.step <= middle],
        [sample for sample in samples if sample.step > middle],
    ]
    if not all(halves):
        raise SystemExit("the run was too short: there are no samples of both halves; give more --steps")
    first, last = halves

    def row(name: str, value: Callable[[Sample], float]) -> Row:
        ends = []
        for half in halves:
            tenth = max(1, len(half) // 10)
            ends += [statistics.median(map(value, half[:tenth])), statistics.median(map(value, half[-tenth:]))]
        return Row(name, (ends[0], ends[1], ends[2], ends[3]))

    return [
        row("resident memory, MB", lambda sample: sample.resident_mb),
        row("of it anonymous, MB", lambda sample: sample.anonymous_mb),
        Row("highest so far, MB", (first[0].peak_mb, first[-1].peak_mb, last[0].peak_mb, last[-1].peak_mb)),
        row("threads", lambda sample: sample.threads),
        row("open files", lambda sample: sample.files),
    ]


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    yield "| | first half, from to | growth | last half, from to | growth | |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        a, b, c, d = (f"{level:,.1f}".removesuffix(".0") for level in row.levels)
        first, last = row.growth
        verdict = f"grows by more than {MOST_GROWTH:g}%" if row.grows else "flat"
        yield f"| {row.name} | {a} to {b} | {first:+.1f}% | {c} to {d} | {last:+.1f}% | {verdict} |"


def draw(samples: Sequence[Sample], file: Path) -> None:
    """Draw memory, threads and open files over the steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {file.name}: matplotlib is not installed; pip install 'gpt2xla[plot]'")
        return
    figure = Figure(figsize=(8, 4.2), dpi=110, layout="constrained")
    memory, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = [sample.step for sample in samples]
    lines = (("highest so far", "peak_mb", "#999999"), ("resident", "resident_mb", "#0072B2"))
    for name, field, color in (*lines, ("anonymous", "anonymous_mb", "#D55E00")):
        memory.plot(steps, [getattr(sample, field) for sample in samples], label=name, color=color, lw=1)
    for name, field, color in (("threads", "threads", "#009E73"), ("open files", "files", "#CC79A7")):
        counts.plot(steps, [getattr(sample, field) for sample in samples], label=name, color=color, lw=1)
    memory.set_ylabel("MB")
    counts.set_xlabel("step")
    for axes in (memory, counts):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file)


if __name__ == "__main__":
    sys.exit(main())
