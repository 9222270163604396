#!/usr/bin/env python
"""AdamW and Muon on the demo's corpus and model: which has the lower loss after the same tokens, and after the same time.

    python benchmarks/time_to_loss.py

First a sweep: with each optimizer the learning rates of RATES in runs of a quarter of the length, and further ones, by
factors of two, while the best lies at the edge. Then runs of full length with the best of each, one for each of SEEDS. Two
runs go at a time, one of each optimizer and of the same seed, that is the same first weights and the same windows in the
same order, with a thread each: both see the same machine. Seconds are those of training, without validation; the CPU's
seconds are those of the whole process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
ARGUMENT = "## Which default"
OPTIMIZERS = ("adamw", "muon")
RATES = (0.002, 0.004, 0.008)
SWEEP_SEED, SEEDS = 0, (1, 2, 3)
VALIDATIONS = 10
TOKENS_PER_STEP = 16 * 128


@dataclass(frozen=True)
class Run:
    optimizer: str
    rate: float
    seed: int
    steps: int


def train(folder: Path, data: Path, run: Run) -> dict:
    """Validation losses after so many tokens and seconds; what was trained before in `folder` is read, not trained again."""
    checkpoints = folder / f"{run.optimizer}-{run.rate:g}-seed-{run.seed}-{run.steps}-steps"
    usage = checkpoints / "usage.json"
    if not usage.exists():
        start = time.perf_counter()
        process = subprocess.Popen(
            map(str, (
                sys.executable, ROOT / "run_pretrain.py", "--train-dir", data / "train", "--valid-dir", data / "test",
                "--shuffle", "--checkpoints-dir", checkpoints, "--vocab-size", 4096, "--seq-length", 128, "--d-model", 128,
                "--num-layers", 4, "--num-heads", 4, "--train-batch-size", 16, "--gradient-accum-step", 1,
                "--eval-batch-size", 16, "--valid-steps", 40, "--valid-interval", max(run.steps // VALIDATIONS, 1),
                "--save-interval", 0, "--train-steps", run.steps, "--decay-steps", run.steps,
                "--warmup-steps", max(run.steps // 16, 1), "--learning-rate", run.rate, "--min-lr", run.rate / 10,
                "--optim-type", run.optimizer, "--seed", run.seed,
            )),
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        _, status, resources = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{run} ended with exit code {os.waitstatus_to_exitcode(status)}")
        seconds, cpu_seconds = time.perf_counter() - start, resources.ru_utime + resources.ru_stime
        usage.write_text(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}))
        print(run, f"{seconds:.0f} s, of the CPU {cpu_seconds:.0f} s", flush=True)
    return curve(checkpoints) | json.loads(usage.read_text())


def curve(checkpoints: Path) -> dict:
    tokens, seconds, losses, spent = [], [], [], 0.0
    rates = []
    for line in map(json.loads, (checkpoints / "metrics.jsonl").read_text().splitlines()):
        if "loss" in line:
            rates.append(line["tokens_per_second"])
            spent += TOKENS_PER_STEP / rates[-1]
        elif "valid_loss" in line:
            tokens.append(line["tokens"])
            seconds.append(spent)
            losses.append(line["valid_loss"])
    return {
        "tokens": tokens,
        "training_seconds": seconds,
        "valid_loss": losses,
        "tokens_per_second": statistics.median(rates),
    }


def first_reached(loss: float, result: dict, axis: str) -> float | None:
    """Where on `axis` the validation loss first was `loss`, on straight lines between validations."""
    points = list(zip(result[axis], result["valid_loss"], strict=True))
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 <= loss:
            return x0 + (x1 - x0) * min(max((y0 - loss) / (y0 - y1), 0.0), 1.0)
    return None


def measure(folder: Path, data: Path, steps: int) -> dict:
    with ThreadPoolExecutor(max_workers=len(OPTIMIZERS)) as pool:

        def train_all(runs: list[Run]) -> list[dict]:
            return list(pool.map(lambda run: train(folder, data, run), runs))

        sweep: dict[str, dict[float, float]] = {optimizer: {} for optimizer in OPTIMIZERS}
        asked = [Run(optimizer, rate, SWEEP_SEED, steps // 4) for rate in RATES for optimizer in OPTIMIZERS]
        while asked:
            for run, result in zip(asked, train_all(asked), strict=True):
                sweep[run.optimizer][run.rate] = result["valid_loss"][-1]
            asked = [Run(name, beyond, SWEEP_SEED, steps // 4) for name in OPTIMIZERS for beyond in edge(sweep[name])]
        best = {optimizer: min(losses, key=lambda rate: losses[rate]) for optimizer, losses in sweep.items()}
        runs = [Run(optimizer, best[optimizer], seed, steps) for seed in SEEDS for optimizer in OPTIMIZERS]
        results = train_all(runs)
    return {
        "sweep_steps": steps // 4,
        "sweep": sweep,
        "best_rate": best,
        "runs": {
            name: [r for run, r in zip(runs, results, strict=True) if run.optimizer == name] for name in OPTIMIZERS
        },
    }


def edge(losses: dict[float, float]) -> list[float]:
    """The rate beyond the best one, if that is the lowest or the highest tried."""
    best = min(losses, key=lambda rate: losses[rate])
    return [best * 2] * (best == max(losses)) + [best / 2] * (best == min(losses))


def summarize(results: dict) -> dict:
    """Of each optimizer; `reached` compares each run with AdamW's of the same seed."""
    goals = [run["valid_loss"][-1] for run in results["runs"]["adamw"]]
    summary = {}
    for name, runs in results["runs"].items():
        reached = {
            axis: [first_reached(goal, run, axis) for goal, run in zip(goals, runs, strict=True)]
            for axis in ("tokens", "training_seconds")
        }
        summary[name] = {
            "final_loss": spread([run["valid_loss"][-1] for run in runs]),
            "tokens_per_second": spread([run["tokens_per_second"] for run in runs]),
            "cpu_seconds": spread([run["cpu_seconds"] for run in runs]),
            "reached": {axis: None if None in found else spread(found) for axis, found in reached.items()},
        }
    return summary


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "least": min(values), "most": max(values)}


def table(results: dict) -> str:
    lines = [
        "| | learning rate | final validation loss (least to most) | tokens to AdamW's final loss | seconds to it | tokens/s"
        " | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results["summary"].items():
        tokens, seconds = (row["reached"][axis] for axis in ("tokens", "training_seconds"))
        loss = row["final_loss"]
        lines.append(
            f"| {name} | {results['best_rate'][name]:g} | {loss['mean']:.4f} ({loss['least']:.4f} to {loss['most']:.4f}) | "
            + (f"{tokens['mean']:,.0f} | {seconds['mean']:.0f} | " if tokens else "not reached | not reached | ")
            + f"{row['tokens_per_second']['mean']:,.0f} | {row['cpu_seconds']['mean']:.0f} |"
        )
    sweep = "; ".join(
        f"{name} " + ", ".join(f"{float(rate):g}: {losses[rate]:.4f}" for rate in sorted(losses, key=float))
        for name, losses in results["sweep"].items()
    )
    return "\n".join(lines) + (
        f"\n\n{results['date']}, {results['hardware']}, load average {results['load_average']:.1f}, torch "
        f"{results['torch']}, `python benchmarks/time_to_loss.py --steps {results['steps']}`: the demo's corpus and model, "
        f"{results['steps']} updates of {TOKENS_PER_STEP:,} tokens, means of seeds {', '.join(map(str, SEEDS))}. "
        f"Final validation losses of the sweep, {results['sweep_steps']} updates, by learning rate: {sweep}.\n"
    )


def plot(results: dict, output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axes, axis, label in zip(
        panels, ("tokens", "training_seconds"), ("tokens", "seconds of training"), strict=True
    ):
        for number, (name, runs) in enumerate(results["runs"].items()):
            for seed, run in zip(SEEDS, runs, strict=True):
                title = f"{name}, rate {results['best_rate'][name]:g}" if seed == SEEDS[0] else None
                axes.plot(run[axis], run["valid_loss"], color=f"C{number}", marker=".", linewidth=1, label=title)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].legend()
    figure.suptitle(f"{len(SEEDS)} seeds each; {results['hardware']}, load average {results['load_average']:.1f}")
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=400, help="updates of the long runs; those of the sweep have a quarter"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("demo"), help="for data and runs; what is there is not made again"
    )
    parser.add_argument("--hardware", default=f"{os.cpu_count()} cores", help="the machine in words")
    options = parser.parse_args()
    if options.steps < 40:
        parser.error(f"--steps {options.steps} is too few for a sweep of a quarter of them; use 40 or more")
    if options.folder.exists() and not options.folder.is_dir():
        parser.error(f"--folder {options.folder} is a file; name a folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("plotting needs matplotlib; pip install 'gpt2xla[plot]'") from None
    sys.path.append(str(ROOT))
    from scripts.demo import prepare_corpus

    data = prepare_corpus(options.folder)
    results = {
        "date": str(date.today()), "hardware": options.hardware, "torch": torch.__version__, "steps": options.steps,
    } | measure(options.folder / "time_to_loss", data, options.steps)  # fmt: skip
    results["load_average"] = os.getloadavg()[2]
    results["summary"] = summarize(results)
    (RESULTS / "time_to_loss.json").write_text(json.dumps(results, indent=2) + "\n")
    page = RESULTS / "time_to_loss.md"
    _, _, argument = (page.read_text() if page.exists() else "").partition(ARGUMENT)
    page.write_text(table(results) + "\n" + ARGUMENT + argument)  # the argument is written by hand
    plot(results, RESULTS / "time_to_loss.png")
    print(table(results))


if __name__ == "__main__":
    main()
