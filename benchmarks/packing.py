#!/usr/bin/env python
"""Instruct tuning's speed: conversations packed into rows, padded, and TRL's SFTTrainer, in tokens that count per second.

    pip install -e '.[bench]' trl
    python benchmarks/packing.py --records instruction-data.json --tokenizer TOKENIZER

`--records` are alpaca records (the results are on 1,100 of them, from github.com/rasbt/LLMs-from-scratch), `--tokenizer` a
folder from `scripts/train_tokenizer.py --special-tokens '<|im_start|>' '<|im_end|>'`. All contenders have the same weights
and conversations, 32 of these per update or the rows that hold about as many, and torch compiles nothing. Those of a group
take turns, so that all see the same machine, and a round's ratios are taken between neighbours. Ratios are given by the wall
clock, which other programs disturb, and by the CPU time of all threads, which they disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from train_turns import spread

from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.config import ModelConfig
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.errors import counted
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2

CONTENDERS = Path(__file__).with_name("packing_contenders.py")
RESULTS = Path(__file__).parent / "results"
GROUPS = {
    "torch": ["packed, torch", "padded to the row, torch", "padded to the longest, torch"],
    "XLA": ["packed, XLA", "padded to the row, XLA"],
    "TRL": [
        "packed, torch", "SFTTrainer", "SFTTrainer, no checkpointing", "SFTTrainer, packing",
        "SFTTrainer, packing, no checkpointing",
    ],
}  # fmt: skip


class Running:
    """A contender in its process."""

    def __init__(self, name: str, model: Path, records: Path, seq_length: int, log: Path) -> None:
        environment = {**os.environ, "PJRT_DEVICE": "CPU", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment |= {} if "XLA" in name else {"USE_TORCH_XLA": "0"}  # or SFTTrainer would take XLA's CPU
        command = [sys.executable, "-W", "ignore", CONTENDERS, "--contender", name, "--model", model]
        command += ["--records", records, "--seq-length", seq_length]
        self.name, self.log = name, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [str(part) for part in command], env=environment, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip

    def train(self, updates: int) -> dict[str, list[float]]:
        """Return the trained tokens, seconds and CPU seconds of each of so many updates."""
        assert self.process.stdin and self.process.stdout  # noqa: PT018
        self.process.stdin.write(f"{updates}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.name} ended early:\n{self.log.read_text()[-3000:]}")
        return json.loads(answer)

    def end(self) -> None:
        self.process.communicate()


def measure(
    names: list[str], folder: Path, args: argparse.Namespace, seq_length: int
) -> dict[str, dict[str, list[float]]]:
    """Return for each contender its trained tokens per second, per CPU second and per update, a value per round."""
    model = draw_weights(folder / str(seq_length), args.tokenizer, args.layers, args.d_model, seq_length)
    running = [Running(name, model, args.records, seq_length, folder / f"{name}.log") for name in names]
    for one in running:  # the first update compiles, too
        one.train(1)
        print(f"{seq_length}: {one.name} is ready", flush=True)
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": [], "per_update": []} for name in names}
    for number in range(args.rounds):
        for one in running:
            turn = one.train(args.updates)
            trained = sum(turn["trained"])
            values = trained / sum(turn["seconds"]), trained / sum(turn["cpu_seconds"]), trained / args.updates
            for kind, value in zip(found[one.name], values, strict=True):
                found[one.name][kind].append(value)
            print(f"{seq_length}: round {number + 1}: {one.name}: {values[0]:,.0f} tokens/s", flush=True)
    for one in running:
        one.end()
    return found


def draw_weights(folder: Path, tokenizer: Path, layers: int, d_model: int, seq_length: int) -> Path:
    """Write the first weights of a model, and the tokenizer, to `folder`, and return it."""
    folder.mkdir(exist_ok=True)
    loaded = load_tokenizer(str(tokenizer))
    config = ModelConfig(
        vocab_size=-(-loaded.vocab_size // 128) * 128, seq_length=seq_length, d_model=d_model, num_layers=layers,
        num_heads=d_model // 64,
    )  # fmt: skip
    model = GPT2(config)
    model.init_weights(torch.Generator().manual_seed(0))
    hf.save_model(folder, config, model.state_dict(), GenerationSettings.ending_with(None))
    loaded.save(folder)
    return folder


def table(runs: list[dict[str, Any]]) -> str:
    """Return what `measure` returned, as Markdown. The first contender of a group is what the others are compared with."""
    lines = [
        "| row length | | tokens that count /s | per update | the first of the group is faster by | by CPU time |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        first = next(iter(run["contenders"].values()))
        for name, values in run["contenders"].items():
            by_wall, by_cpu = (
                spread([own / theirs for own, theirs in zip(first[kind], values[kind], strict=True)], ".2f")
                for kind in ("wall", "cpu")
            )
            count = statistics.mean(values["per_update"])
            lines.append(
                f"| {run['seq_length']} | {name} | {spread(values['wall'], ',.0f')} | {count:,.0f} | {by_wall} | {by_cpu} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True, help="a JSON file of alpaca records")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with ChatML's special tokens")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--seq-lengths", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=1, help="updates per turn")
    parser.add_argument("--hardware", default=f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}")
    parser.add_argument("--output", type=Path, default=RESULTS / "packing", help="without the suffix")
    args = parser.parse_args()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if "TRL" in args.groups:
        try:
            import accelerate
            import trl
        except ImportError as error:
            parser.error(f"{error}: pip install trl accelerate, or leave TRL out of --groups")
        versions |= {"trl": trl.__version__, "accelerate": accelerate.__version__}
    results: dict[str, Any] = {
        "date": str(date.today()), "hardware": args.hardware, "versions": versions, "rounds": args.rounds,
        "updates": args.updates, "model": f"{args.layers} layers of width {args.d_model}", "runs": [],
    }  # fmt: skip
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = (
        f"{results['hardware']}; {results['date']}; {shown}; fp32; {results['model']}; "
        f"{args.rounds} rounds of {counted(args.updates, 'update')}; medians, in brackets the least and the most.\n\n"
    )
    with tempfile.TemporaryDirectory() as name:
        for group in args.groups:
            for seq_length in args.seq_lengths:
                found = measure(GROUPS[group], Path(name), args, seq_length)
                results["runs"].append({"group": group, "seq_length": seq_length, "contenders": found})
                args.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
                args.output.with_suffix(".md").write_text(head + table(results["runs"]))
    print(head + table(results["runs"]))


if __name__ == "__main__":
    main()
