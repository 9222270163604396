#!/usr/bin/env python
"""Drawings that a small GPT-2 draws and recognises, against plain classifiers of the same pictures: docs/sketches.md.

    python benchmarks/sketches.py train --input quickdraw --folder sketches
    python benchmarks/sketches.py ablate --input quickdraw --folder sketches --steps 400
    python benchmarks/sketches.py baselines --input quickdraw --folder sketches
    python benchmarks/sketches.py report --folder sketches

`train` prepares the drawings and trains the model by the ordinary commands. `ablate` does it again with one choice changed
at a time, for fewer updates. `baselines` fits the nearest neighbour on pixels and logistic regression to the same pictures.
`report` compares all on the drawings held out, lets the model draw, and lets the regression, which has never seen the model,
judge its drawings. It writes what it ran and found to sketches.md, and the grid of drawings to sketches-grid.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gpt2xla.checkpoint.loading import build_model, load_weights, locate
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.tokenizer import find_tokenizer, load_tokenizer
from gpt2xla.evals.recognition import word_log_probabilities
from gpt2xla.generation.drawing import draw
from gpt2xla.generation.sampling import SamplingConfig
from gpt2xla.logs.sketch_picture import sketch_picture
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.sketches.format import SketchFormat

ROOT = Path(__file__).resolve().parent.parent
# Words of things with a common shape, chosen before any was drawn.
DRAWN = (
    "apple", "bicycle", "book", "candle", "car", "cloud", "cup", "envelope", "eye", "fish", "flower", "house", "key",
    "ladder", "lightning", "mountain", "mushroom", "star", "sun", "umbrella",
)  # fmt: skip
REGULARIZATION = (0.003, 0.01, 0.03, 0.1, 0.3)  # the C of logistic regression; the best one counts, in its favour
PER_WORD = 5  # drawings of each
STROKES = ("--stroke-width", "2", "--test-fraction", "0.1")
PREPARATION = (*STROKES, "--augment", "30", "--word-before", "0.3", "--seq-length", "80")
# The ablation has a third of the words, a fifth of their drawings held out, and a smaller model, for shorter runs.
ABLATED = (*PREPARATION, "--augment", "8", "--word-before", "0.1", "--test-fraction", "0.2")
SMALL = shlex.split(
    "--d-model 96 --num-layers 3 --num-heads 3 --sequences-per-update 16 --mixed-precision bf16 --save-interval 0 "
    "--sketches-interval 0"
)
# What is changed: options of the preparation and of the training, which override those before.
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "strokes 2 pixels wide, altered copies, the word before in a tenth, pieces of 8 pixels, Muon": ((), ()),
    "no augmentation": (("--augment", "0"), ()),
    "strokes 1 pixel wide": (("--stroke-width", "1"), ()),
    "the word before in every drawing, all tokens trained on": (("--word-before", "1", "--loss-on", "all"), ()),
    "the word before in half, all tokens trained on": (("--word-before", "0.5", "--loss-on", "all"), ()),
    "the word before in half": (("--word-before", "0.5"), ()),
    "the word before in none": (("--word-before", "0"), ()),
    # Of its rows of 256 tokens each holds two or three drawings.
    "BPE of whole rows": (("--tokenizer", "ROWS", "--seq-length", "256"), ("--sequences-per-update", "6")),
    "AdamW at 1e-3": ((), ("--optim-type", "adamw", "--learning-rate", "1e-3")),
}


class Account:
    """Commands in the order in which they ran, and the seconds of CPU time that each took, kept in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def run(self, program: str, *arguments: object) -> str:
        """Run a program of this repository, and return what it printed. Exits where it fails."""
        words = [str(argument) for argument in arguments]
        shown = f"python {program} {shlex.join(_without_many(words))}"
        print(f"$ {shown}", flush=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        finished = subprocess.run(
            [sys.executable, str(ROOT / program), *words],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if finished.returncode:
            sys.exit(f"{finished.stdout[-4000:]}\nexit code {finished.returncode}")
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        with self.file.open("a") as lines:
            lines.write(f"{shown}  # {seconds:,.0f} s of CPU time\n")
        print(finished.stdout, flush=True)
        return finished.stdout


def _without_many(words: Sequence[str]) -> list[str]:
    """Return a command's words; of many values of one option only the first and the last."""
    shown: list[str] = []
    for _, group in itertools.groupby(words, key=lambda word: word.startswith("--")):
        values = list(group)
        shown += values if len(values) < 10 else [values[0], values[1], "...", values[-1]]
    return shown


class Drawings(NamedTuple):
    """Pictures (N, size * size) of 0 and 1, and the number of each one's word (N,)."""

    pixels: np.ndarray
    labels: np.ndarray


def drawings(split: Path) -> Drawings:
    """Return the drawings of a prepared split, from its ids."""
    stream, sketches = TokenStream(split), SketchFormat.of(load_tokenizer(str(split)))
    assert sketches is not None
    assert stream.row_length is not None
    number = {word: place for place, word in enumerate(sketches.words)}
    pixels, labels = [], []
    for first in range(0, stream.length - 1, stream.row_length):
        for picture, word in sketches.sketches(stream.read(first, stream.row_length).tolist()):
            pixels.append(picture.ravel())
            labels.append(number[word])
    return Drawings(np.array(pixels, dtype=np.float32), np.array(labels))


def nearest_neighbour(train: Drawings, test: Drawings, words: int) -> np.ndarray:
    """Return scores (N, words): minus the squared distance to the nearest drawing of each word."""
    squares = np.square(test.pixels).sum(1)[:, None] + np.square(train.pixels).sum(1) - 2 * test.pixels @ train.pixels.T
    scores = np.full((len(test.labels), words), -np.inf)
    for word in np.unique(train.labels):
        scores[:, word] = -squares[:, train.labels == word].min(1)
    return scores


class Regression(NamedTuple):
    """Logistic regression on pixels, as scikit-learn has fitted it: weights (classes, pixels), biases, and their words."""

    weights: np.ndarray
    biases: np.ndarray
    classes: np.ndarray

    @classmethod
    def fitted(cls, train: Drawings, c: float) -> Regression:
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=c, max_iter=300).fit(train.pixels, train.labels)
        return cls(model.coef_, model.intercept_, model.classes_)

    def scores(self, pixels: np.ndarray, words: int) -> np.ndarray:
        """Return logits (N, words); a word without a drawing to train on has -inf."""
        found = np.full((len(pixels), words), -np.inf)
        found[:, self.classes] = pixels @ self.weights.T + self.biases
        return found


class Accuracy(NamedTuple):
    """How many of `count` drawings have their word first, and among the first five."""

    top1: int
    top5: int
    count: int

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray) -> Accuracy:
        """Count from scores (N, words). Of words with one score the earlier one counts as likelier."""
        order = np.argsort(-scores, axis=1, kind="stable")[:, :5] == labels[:, None]
        return cls(int(order[:, 0].sum()), int(order.any(1).sum()), len(labels))

    def cells(self) -> str:
        return f"{_share(self.top1, self.count)} | {_share(self.top5, self.count)}"


def _share(right: int, count: int) -> str:
    """Return a share in percent with its standard error."""
    share = right / count
    return f"{share:.1%} ± {math.sqrt(share * (1 - share) / count):.1%}"


def prepare(account: Account, inputs: Path, folder: Path, options: Sequence[object]) -> Path:
    """Prepare drawings in `folder`, and return it."""
    account.run("scripts/prepare_sketches.py", "--input", inputs, "--output-dir", folder, *options)
    return folder


def train(args: argparse.Namespace, account: Account) -> None:
    """The model."""
    data = prepare(account, args.input, args.folder / "drawings", PREPARATION)
    account.run(
        "run_pretrain.py", "--config", ROOT / "configs/sketches.yaml", "--train-dir", data,
        "--checkpoints-dir", args.folder / "model", *args.options,
    )  # fmt: skip


def ablate(args: argparse.Namespace, account: Account) -> None:
    """The same with one choice changed at a time; a variant that is there already is not trained again."""
    names = sorted({json.loads(file.open().readline())["word"] for file in args.input.glob("*.ndjson")})[::3]
    found = args.folder / "ablation.jsonl"
    done = [json.loads(line)["variant"] for line in found.read_text().splitlines()] if found.exists() else []
    for name, (preparation, training) in VARIANTS.items():
        if name in done or not (args.only is None or re.search(args.only, name)):
            continue
        folder = args.folder / "ablation" / re.sub(r"\W+", "-", name)
        options = [*ABLATED, *preparation, "--words", *names]
        if "ROWS" in options:
            options[options.index("ROWS")] = str(row_tokenizer(account, args, names))
        data = prepare(account, args.input, folder / "drawings", options)
        account.run(
            "run_pretrain.py", "--config", ROOT / "configs/sketches.yaml", "--train-dir", data,
            "--checkpoints-dir", folder / "model", *SMALL, "--train-steps", args.steps, *training,
        )  # fmt: skip
        test = drawings(data / "test")
        scores = model_scores(folder / "model", test)
        line = {"variant": name, "accuracy": Accuracy.of(scores, test.labels)}
        line["by prior"] = Accuracy.of(scores - prior(drawings(data / "train"), scores.shape[1]), test.labels)
        line["chance"] = 5 / scores.shape[1]
        with found.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        print(line, flush=True)


def row_tokenizer(account: Account, args: argparse.Namespace, words: Sequence[str]) -> Path:
    """Train a byte-level BPE of about as many ids on the text of the drawings, and return its folder."""
    text, folder = args.folder / "text", args.folder / "rows"
    prepare(account, args.input, text, (*STROKES, "--as-text", "--words", *words))
    account.run(
        "scripts/train_tokenizer.py", "--input", text / "train/sketches.txt", "--output-dir", folder, "--vocab-size", 1000,
    )  # fmt: skip
    return folder


def prior(train: Drawings, words: int) -> np.ndarray:
    """Return the log of each word's share of the drawings trained on."""
    counts = np.bincount(train.labels, minlength=words)
    return np.log(np.maximum(counts, 1) / counts.sum())


def model_scores(source: Path, test: Drawings) -> np.ndarray:
    """Return the log-probability (N, words) of each word after each picture, from a checkpoint."""
    model, sketches = load(source)
    return word_log_probabilities(model, sketches, list(as_pictures(test.pixels)))


def load(source: Path) -> tuple[GPT2, SketchFormat]:
    """Return a model and the format of its sketches."""
    folder = locate(str(source))
    config, weights = load_weights(folder)
    sketches = SketchFormat.of_model(str(source), find_tokenizer(None, folder, config.real_vocab_size))
    return build_model(config, weights, folder).eval(), sketches


def as_pictures(pixels: np.ndarray) -> np.ndarray:
    size = math.isqrt(pixels.shape[1])
    return pixels.reshape(-1, size, size) > 0


def baselines(args: argparse.Namespace, account: Account) -> None:
    """The other classifiers, on the same drawings without altered copies."""
    folder = prepare(account, args.input, args.folder / "plain", (*STROKES, "--word-before", 0))
    train_set, test = drawings(folder / "train"), drawings(folder / "test")
    words = 1 + int(max(train_set.labels.max(), test.labels.max()))
    found = {"nearest neighbour on pixels": Accuracy.of(nearest_neighbour(train_set, test, words), test.labels)}
    print(found, flush=True)
    best = 0
    for c in REGULARIZATION:
        regression = Regression.fitted(train_set, c)
        accuracy = Accuracy.of(regression.scores(test.pixels, words), test.labels)
        found[f"logistic regression, C = {c}"] = accuracy
        print(c, accuracy, flush=True)
        if accuracy.top5 > best:
            best = accuracy.top5
            np.savez(args.folder / "regression.npz", **regression._asdict())
    (args.folder / "baselines.json").write_text(json.dumps(found))


def report(args: argparse.Namespace, account: Account) -> None:
    """Compare the model with the other classifiers, let it draw, and write the page."""
    source = args.model or args.folder / "model"
    train_set, test = drawings(args.folder / "plain/train"), drawings(args.folder / "plain/test")
    model, sketches = load(source)
    words = len(sketches.words)
    lines = [("GPT-2", Accuracy.of(scores := model_scores(source, test), test.labels))]
    lines += [("GPT-2, less the log of the word's share", Accuracy.of(scores - prior(train_set, words), test.labels))]
    others = json.loads((args.folder / "baselines.json").read_text())
    lines += [(name, Accuracy(*counts)) for name, counts in others.items()]
    judge = Regression(**np.load(args.folder / "regression.npz"))

    drawn = [word for word in DRAWN for _ in range(PER_WORD)]
    sampling = SamplingConfig(top_p=0.9)
    pictures = draw(model, sketches, drawn, sampling, range(len(drawn)))
    well_formed = sum(picture.shape == (sketches.size, sketches.size) for picture in pictures)
    first = [number for number in range(len(drawn)) if number % PER_WORD == 0]
    args.grid.write_bytes(sketch_picture([pictures[number] for number in first], list(DRAWN)))
    chosen = np.array([sketches.words.index(word) for word in DRAWN])
    labels = np.repeat(chosen, PER_WORD)
    real = np.isin(test.labels, chosen)
    judged = {}
    for name, pixels, truth in (
        ("drawn by the model", np.array([picture.ravel() for picture in pictures], dtype=np.float32), labels),
        ("held out", test.pixels[real], test.labels[real]),
    ):
        given = judge.scores(pixels, words)
        among = np.full_like(given, -np.inf)
        among[:, chosen] = given[:, chosen]
        judged[name] = Accuracy.of(given, truth), Accuracy.of(among, truth)
    page = written(args, account, lines, judged, well_formed, (len(train_set.labels), len(test.labels), words))
    args.output.write_text(page)
    print(page)


def written(
    args: argparse.Namespace,
    account: Account,
    compared: Sequence[tuple[str, Accuracy]],
    judged: dict[str, tuple[Accuracy, Accuracy]],
    well_formed: int,
    counts: tuple[int, int, int],
) -> str:
    """Return the page of results."""
    train_count, test_count, words = counts
    lines = [
        "# Sketches: recognised and drawn", "",
        f"{args.hardware}; {date.today()}; torch {torch.__version__}. From `benchmarks/sketches.py`. {train_count:,} "
        f"drawings of {words} words to train on and {test_count} held out, 24x24 pixels; ± is one standard error.", "",
        "| held out | top-1 | top-5 |", "|---|---|---|",
        *(f"| {name} | {accuracy.cells()} |" for name, accuracy in compared),
        f"| chance | {1 / words:.1%} | {5 / words:.1%} |", "",
        f"{well_formed} of {len(DRAWN) * PER_WORD} drawings of {len(DRAWN)} words are {len(DRAWN)} x {PER_WORD} whole "
        f"pictures. The best logistic regression, which was trained on real drawings only, judges:", "",
        f"| | drawings | top-1 of {words} | top-5 of {words} | top-1 of the {len(DRAWN)} | top-5 of the {len(DRAWN)} |",
        "|---|---|---|---|---|---|",
        *(f"| {name} | {all_.count} | {all_.cells()} | {few.cells()} |" for name, (all_, few) in judged.items()),
        f"| chance | | {1 / words:.1%} | {5 / words:.1%} | {1 / len(DRAWN):.1%} | {5 / len(DRAWN):.1%} |", "",
    ]  # fmt: skip
    if (file := args.folder / "ablation.jsonl").exists():
        found = [json.loads(line) for line in file.read_text().splitlines()]
        lines += [
            "Ablation: a third of the words, a fifth of their drawings held out, and a smaller model.", "",
            "| | held out | top-1 | top-5 | top-5 less the log of the word's share |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for line in found:
            plain, by_prior = Accuracy(*line["accuracy"]), Accuracy(*line["by prior"])
            top5 = by_prior.cells().split(" | ")[1]
            lines.append(f"| {line['variant']} | {plain.count} | {plain.cells()} | {top5} |")
        lines.append(f"| chance | | {found[0]['chance'] / 5:.1%} | {found[0]['chance']:.1%} | |")
    page = "\n".join([*lines, "", "Commands:", "", "```bash", account.file.read_text().strip(), "```", ""])
    for path, name in {str(ROOT): ".", str(args.folder): "sketches"}.items():
        page = page.replace(path, name)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    first = parts.add_parser("train", help="prepare the drawings and train the model")
    first.add_argument("options", nargs="*", default=[], help="after --: further options of the training")
    second = parts.add_parser("ablate", help="train smaller models, with one choice changed at a time")
    second.add_argument("--steps", type=int, default=1200)
    second.add_argument("--only", help="regular expression of the variants to train (default: all)")
    others = parts.add_parser("baselines", help="fit the other classifiers")
    third = parts.add_parser("report", help="compare, draw, judge, and write the page")
    third.add_argument("--model", type=Path, help="a checkpoint (default: the newest one of the model)")
    third.add_argument("--hardware", default=f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}")
    third.add_argument("--output", type=Path, default=Path("sketches.md"))
    third.add_argument("--grid", type=Path, default=Path("sketches-grid.png"))
    for part in (first, second, others):
        part.add_argument("--input", type=Path, required=True, help="folder of Quick, Draw!'s ndjson, one file a word")
    for part in (first, second, others, third):
        part.add_argument("--folder", type=Path, default=Path("sketches"), help="where data and checkpoints go")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    {"train": train, "ablate": ablate, "baselines": baselines, "report": report}[args.part](
        args, Account(args.folder / "commands.txt")
    )


if __name__ == "__main__":
    main()
