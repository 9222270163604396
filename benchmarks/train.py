#!/usr/bin/env python
"""Training speed: ours, nanoGPT, transformers' Trainer and, on a CPU, the trainer that this one set out from.

    git clone https://github.com/karpathy/nanoGPT
    git clone https://github.com/minhnguyent546/pre-training-gpt2
    pip install -e '.[bench]'
    python benchmarks/train.py --nanogpt nanoGPT --reference pre-training-gpt2

Same shapes, first weights, tokens, precision and rates for all. In each round they take turns, so that all see the same
machine, and a round's ratios are taken between neighbours: other programs disturb the rates, and the ratios less. The tuned
nanoGPT is the fastest that settings make of it: torch.compile, fused AdamW and, on CPUs, products through oneDNN and glibc
told to keep freed memory and to use huge pages. Before the rounds, ours and that one each make --curve updates, and the
largest difference between their losses is noted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from train_contenders import SIZES
from train_turns import Contender, Turns, measure, table

RESULTS = Path(__file__).parent / "results"


def contenders(args: argparse.Namespace) -> list[Contender]:
    found = [Contender("ours", "ours", compile=True, is_compared=True), Contender("ours, not compiled", "ours")]
    if args.nanogpt:
        nano = Contender("nanoGPT", "nanoGPT", args.nanogpt)
        found += [replace(nano, name="nanoGPT, tuned", compile=True, tuned=True, is_compared=True)]
        found += [nano] if args.device == "cpu" else []
    if args.trainer:
        trainer = Contender("Trainer", "Trainer")
        found += [trainer] if args.device == "cpu" else [replace(trainer, name="Trainer, compiled", compile=True)]
    if args.reference and args.device == "cpu":
        found += [Contender("reference", "reference", args.reference)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--reference", type=Path, help="a checkout of minhnguyent546/pre-training-gpt2")
    parser.add_argument("--no-trainer", dest="trainer", action="store_false", help="leave transformers' Trainer out")
    parser.add_argument("--only", nargs="+", help="beside ours these alone, by the names in the table")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["6x384", "124M"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"))
    parser.add_argument("--batch", type=int, help="sequences per update (default: by size and device)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=2, help="timed updates per turn, after one that is not")
    parser.add_argument("--curve", type=int, default=50, help="updates of which the losses are compared")
    parser.add_argument("--hardware", default=f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}")
    parser.add_argument("--output", type=Path, help="without the suffix (default: benchmarks/results/train_DEVICE)")
    args = parser.parse_args()
    for flag, folder, model in (
        ("--nanogpt", args.nanogpt, "model.py"),
        ("--reference", args.reference, "gpt2/model.py"),
    ):
        if folder and not (folder / model).is_file():
            parser.error(f"{flag} {folder} holds no {model}; name a checkout")
    found = contenders(args)
    names = [contender.name for contender in found]
    if unknown := set(args.only or []) - set(names):
        parser.error(
            f"--only {', '.join(sorted(unknown))}: there are only {', '.join(map(repr, names))}; name peers' folders"
        )
    chosen = [contender for contender in found if not args.only or contender.name in ("ours", *args.only)]
    if args.trainer:
        try:
            import accelerate  # noqa: F401
        except ImportError:
            parser.error("transformers' Trainer needs accelerate: pip install -e '.[bench]', or --no-trainer")
    precisions = args.precisions or (["fp32", "bf16"] if args.device == "cpu" else ["bf16"])
    output = args.output or RESULTS / f"train_{args.device}"
    results: dict[str, Any] = {
        "date": str(date.today()), "torch": torch.__version__, "transformers": transformers.__version__,
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else args.hardware,
        "rounds": args.rounds, "updates": args.updates, "runs": [],
    }  # fmt: skip
    head = (
        f"{results['hardware']}; {results['date']}; torch {results['torch']}, transformers {results['transformers']}; "
        f"{args.rounds} rounds of {args.updates} timed updates; medians, in brackets the least and the most.\n\n"
    )
    turns = Turns(args.rounds, args.updates, args.curve, profiled=frozenset({"ours"}))
    for size in args.sizes:
        for precision in precisions:
            results["runs"].append(measure(chosen, size, precision, args.device, turns, args.batch))
            output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            output.with_suffix(".md").write_text(head + table(results["runs"]))
    print(head + table(results["runs"]))


if __name__ == "__main__":
    main()
