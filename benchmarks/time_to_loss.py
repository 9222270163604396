#!/usr/bin/env python
"""AdamW and Muon at several sizes of model: after how many tokens, and how much time, does each have AdamW's final loss?

    python benchmarks/time_to_loss.py english/1M/160/3 english/5M/160/3

trains models of about 1 and 5 million parameters on the corpus `english` for 160 updates, with three seeds. Of each recipe,
learning rates a factor of sqrt(2) apart are tried with seed 1 until the best one lies inside; a larger model begins with the
smaller one's best rates. The other seeds are trained with the best rate. One seed stands for the same first weights and the
same windows in the same order. Runs are kept in `--folder`, and those found there are not trained again.

Last, the optimizers take turns at single updates of each size, on one thread. The time to a loss is the tokens to it times
the time per update: the runs themselves may be disturbed by what else the machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import asdict, astuple, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
ARGUMENT = "## Which default"
CORPORA = ("demo", "english")
SIZES = {"1M": (128, 4), "5M": (256, 6), "15M": (384, 8)}  # d_model, num_layers; heads of 32
VOCABULARY, LENGTH, SEQUENCES = 1024, 128, 8
RECIPES = {
    "AdamW": ["--optim-type", "adamw"],
    "Muon": ["--optim-type", "muon"],
    "Muon + wsd": ["--optim-type", "muon", "--decay-method", "wsd"],
}
FIRST_RATES = {"AdamW": 0.004, "Muon": 0.016, "Muon + wsd": 0.016}
TURNS = 9
# 1,000 passages of OpenWebText and 1,000 of Wikipedia, from registry/data/schelling_point/ of the package evals 3.0.1.post1.
ENGLISH = ("owt_5.jsonl", "wikipedia_5.jsonl")
Curve = list[tuple[int, float]]  # tokens, validation loss


@dataclass(frozen=True)
class Comparison:
    corpus: str
    size: str
    steps: int
    seeds: int


@dataclass(frozen=True)
class Run:
    comparison: Comparison
    recipe: str
    rate: float
    seed: int = 1

    @property
    def name(self) -> str:
        c = self.comparison
        return f"{c.corpus}-{c.size}-{c.steps}-{self.recipe}-{self.rate:.4f}-{self.seed}".replace(" ", "")

    def flags(self, folder: Path) -> list[str]:
        (d_model, num_layers), steps = SIZES[self.comparison.size], self.comparison.steps
        data = folder / self.comparison.corpus / "data"
        return list(map(str, (
            "--train-dir", data / "train", "--valid-dir", data / "test", "--shuffle", "--seed", self.seed,
            "--vocab-size", VOCABULARY, "--seq-length", LENGTH, "--d-model", d_model, "--num-layers", num_layers,
            "--num-heads", d_model // 32, "--train-batch-size", SEQUENCES, "--gradient-accum-step", 1, "--no-compile",
            "--mixed-precision", "bf16", "--train-steps", steps, "--warmup-steps", steps // 16, "--save-interval", 0,
            "--valid-interval", steps // 8, "--eval-batch-size", 16, "--valid-steps", 4, "--learning-rate", self.rate,
            "--min-lr", self.rate / 10, *RECIPES[self.recipe],
        )))  # fmt: skip


def train(folder: Path, run: Run, only_found: bool = False) -> Curve | None:
    """Return the run's validation losses. If it is not in `folder`, train it, or return None if `only_found`."""
    metrics, checkpoints = folder / "runs" / f"{run.name}.jsonl", folder / "runs" / run.name
    if not metrics.exists() and only_found:
        return None
    if not metrics.exists():
        from gpt2xla.cli import parse_run
        from gpt2xla.config import TorchConfig
        from gpt2xla.runtime.torch.runtime import TorchRuntime
        from gpt2xla.training.pretrain import pretrain

        shutil.rmtree(checkpoints, ignore_errors=True)
        config, options = parse_run(TorchConfig, [*run.flags(folder), "--checkpoints-dir", str(checkpoints)])
        with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            pretrain(config, lambda train: TorchRuntime(options, train))
        (checkpoints / "metrics.jsonl").rename(metrics)
        shutil.rmtree(checkpoints)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    curve = [(line["tokens"], line["valid_loss"]) for line in lines if "valid_loss" in line]
    print(run.name, f"{curve[-1][1]:.4f}", flush=True)
    return curve


def measure(folder: Path, comparison: Comparison, starts: dict[str, float], only_found: bool = False) -> dict[str, Any]:
    """Return what was measured of each recipe. `starts` are the rates to begin with, and get the best ones."""
    recipes = {}
    for recipe, start in starts.items():
        curves: dict[int, Curve | None] = {}  # by the rate's power of sqrt(2), relative to the first rate
        asked = [0, -1, 1]
        while asked:
            for power in asked:
                curves[power] = train(folder, Run(comparison, recipe, start * 2 ** (power / 2)), only_found)
            losses = {power: curve[-1][1] for power, curve in sorted(curves.items()) if curve}
            if not losses:
                break
            best = min(losses, key=lambda power: losses[power])
            asked = [power for power in (best - 1, best + 1) if power not in curves]
        if not losses:
            continue
        starts[recipe] = rate = start * 2 ** (best / 2)
        others = [
            train(folder, Run(comparison, recipe, rate, seed), only_found) for seed in range(2, comparison.seeds + 1)
        ]
        recipes[recipe] = {
            "rate": rate,
            "is_inside": {best - 1, best + 1} <= losses.keys(),
            "sweep": {f"{start * 2 ** (power / 2):.4f}": loss for power, loss in losses.items()},
            "curves": list(itertools.takewhile(bool, (curves[best], *others))),
        }
    if "AdamW" not in recipes:
        sys.exit(f"{folder / 'runs'} has no run with AdamW of {'/'.join(map(str, astuple(comparison)))}")
    goals = [curve[-1][1] for curve in recipes["AdamW"]["curves"]]
    for found in recipes.values():
        found["reached"] = [reached(goal, curve) for goal, curve in zip(goals, found["curves"], strict=False)]
    return asdict(comparison) | {"recipes": recipes}


def reached(loss: float, curve: Curve) -> float | None:
    """Return after how many tokens the validation loss first was `loss`, on straight lines between validations."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 <= loss:
            return x0 + (x1 - x0) * min(max((y0 - loss) / (y0 - y1), 0.0), 1.0)
    return None


def seconds_per_update(size: str) -> dict[str, list[float]]:
    """Return CPU seconds of single updates with AdamW and Muon, which took turns."""
    from gpt2xla.cli import parse_run
    from gpt2xla.config import TorchConfig
    from gpt2xla.data.batch_plan import Phase
    from gpt2xla.data.windows import Batch
    from gpt2xla.model.gpt2 import GPT2
    from gpt2xla.runtime.torch.runtime import TorchRuntime
    from gpt2xla.training.train_step import TrainStep

    steps, seconds = {}, {}
    for recipe in ("AdamW", "Muon"):
        run = Run(Comparison("english", size, 160, 1), recipe, FIRST_RATES[recipe])
        config, options = parse_run(TorchConfig, run.flags(Path()))
        steps[recipe] = TrainStep(config, TorchRuntime(options, config.train), GPT2(config.model), None)
        seconds[recipe] = []
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    for turn in range(TURNS + 2):
        for recipe, step in steps.items():
            start = time.process_time()
            step(iter([Batch(ids[:, :-1], ids[:, 1:])]), turn, Phase(0, SEQUENCES, 1), SEQUENCES * LENGTH)
            seconds[recipe].append(time.process_time() - start)
    return {recipe: values[2:] for recipe, values in seconds.items()}


def prepare(folder: Path, corpus: str) -> None:
    """Make the corpus's tokenizer and shards, unless they are there."""
    from scripts.demo import TEXT, run

    text = TEXT if corpus == "demo" else ("--input", *(folder / name for name in ENGLISH), "--text-column", "0")
    tokenizer, data = folder / corpus / "tokenizer", folder / corpus / "data"
    if not (tokenizer / "tokenizer.json").exists():
        run("scripts/train_tokenizer.py", *text, "--output-dir", tokenizer, "--vocab-size", VOCABULARY)
    if not (data / "test").exists():
        shutil.rmtree(data, ignore_errors=True)
        run("scripts/prepare_text.py", *text, "--output-dir", data, "--tokenizer", tokenizer)


def table(results: dict[str, Any]) -> str:
    """Return the results as a table, means over seeds with the least and the most, and the sweeps below it."""
    lines = [
        "| corpus, parameters, updates | recipe | seeds | rate | final validation loss | tokens to AdamW's final loss | "
        "CPU time to it |",
        "|---|---|---|---|---|---|---|",
    ]
    sweeps = []
    for found in results["comparisons"]:
        total = found["steps"] * SEQUENCES * LENGTH
        what = f"{found['corpus']}, {found['size']}, {found['steps']}"
        for name, recipe in found["recipes"].items():
            shares = [tokens and tokens / total for tokens in recipe["reached"]]
            ratio = time_ratio(results["seconds"][found["size"]], name)
            times = [share and share * ratio for share in shares]
            losses = [curve[-1][1] for curve in recipe["curves"]]
            rate = f"{recipe['rate']:.4f}" + ("" if recipe["is_inside"] else " (edge)")
            figures = (spread(losses, ".3f"), spread(shares, ".0%"), spread(times, ".0%"))
            lines.append(f"| {' | '.join((what, name, str(len(losses)), rate, *figures))} |")
            tried = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in recipe["sweep"].items())
            sweeps.append(f"- {what}, {name}: {tried}")
    pace = "; ".join(
        f"{size} {time_ratio(seconds, 'Muon'):.2f} ({min(found):.2f} to {max(found):.2f})"
        for size, seconds in results["seconds"].items()
        for found in [ratios(seconds, "Muon")]
    )
    lines += [
        f"\n{results['date']}, {results['hardware']}, torch {results['torch']}: `{results['command']}`. Tokens and CPU time "
        "in percent of AdamW's whole run; means, and over seeds the least to the most. CPU time of an update with Muon as a "
        f"multiple of AdamW's: {pace}, medians, least and most of {TURNS} turns on one thread.",
        "\n## The sweeps\n\nFinal validation losses with seed 1 by learning rate:\n",
        *sweeps,
    ]
    return "\n".join(lines) + "\n"


def time_ratio(seconds: dict[str, list[float]], recipe: str) -> float:
    """Return the time of an update as a multiple of AdamW's: the median over turns."""
    return statistics.median(ratios(seconds, recipe))


def ratios(seconds: dict[str, list[float]], recipe: str) -> list[float]:
    return [ours / theirs for ours, theirs in zip(seconds[recipe.split()[0]], seconds["AdamW"], strict=True)]


def spread(values: list[Any], form: str) -> str:
    if None in values:
        return "not reached"
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def plot(results: dict[str, Any], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    comparisons = results["comparisons"]
    figure, panels = plt.subplots(1, len(comparisons), figsize=(4 * len(comparisons) + 1, 4.2), squeeze=False)
    for axes, found in zip(panels[0], comparisons, strict=True):
        for number, (name, recipe) in enumerate(found["recipes"].items()):
            for curve in recipe["curves"]:
                label = (
                    f"{name}, rate {recipe['rate']:.4f}, seeds: {len(recipe['curves'])}"
                    if curve is recipe["curves"][0]
                    else None
                )
                axes.plot(*zip(*curve, strict=True), color=f"C{number}", marker=".", linewidth=1, label=label)
        axes.set_title(f"{found['corpus']}, {found['size']} parameters", fontsize=10)
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0][0].set_ylabel("validation loss (nats per token)")
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def comparison(words: str) -> Comparison:
    """Read CORPUS/SIZE/UPDATES/SEEDS. This is an argparse type."""
    with contextlib.suppress(ValueError):
        corpus, size, steps, seeds = words.split("/")
        if corpus in CORPORA and size in SIZES and int(steps) >= 16 and int(seeds) >= 1:
            return Comparison(corpus, size, int(steps), int(seeds))
    raise argparse.ArgumentTypeError(
        f"{words}: choose CORPUS/SIZE/UPDATES/SEEDS, of {', '.join(CORPORA)} / {', '.join(SIZES)} / 16 or more / 1 or more"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "comparisons", type=comparison, nargs="+", metavar="CORPUS/SIZE/UPDATES/SEEDS", help="such as english/1M/160/3"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("demo/time_to_loss"),
        help="for data and runs; for english, it holds " + " and ".join(ENGLISH),
    )  # fmt: skip
    parser.add_argument("--only-found", action="store_true", help="train nothing: report the runs that are in --folder")
    parser.add_argument("--hardware", default=f"{os.cpu_count()} cores", help="the machine in words")
    options = parser.parse_args()
    sys.path.append(str(ROOT))
    torch.set_num_threads(1)
    for corpus in {c.corpus for c in options.comparisons}:
        prepare(options.folder, corpus)
    starts = dict(FIRST_RATES)
    words = ["python", "benchmarks/time_to_loss.py", *("/".join(map(str, astuple(c))) for c in options.comparisons)]
    results = {
        "date": str(date.today()), "hardware": options.hardware, "torch": torch.__version__, "command": " ".join(words),
        "comparisons": [measure(options.folder, c, starts, options.only_found) for c in options.comparisons],
        "seconds": {size: seconds_per_update(size) for size in dict.fromkeys(c.size for c in options.comparisons)},
    }  # fmt: skip
    (RESULTS / "time_to_loss.json").write_text(json.dumps(results, indent=1) + "\n")
    page = RESULTS / "time_to_loss.md"
    _, _, argument = (page.read_text() if page.exists() else "").partition(ARGUMENT)
    page.write_text(table(results) + "\n" + ARGUMENT + argument)  # the argument is written by hand
    plot(results, RESULTS / "time_to_loss.png")
    print(table(results))


if __name__ == "__main__":
    main()
