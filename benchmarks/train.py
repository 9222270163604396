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
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.config import PRESETS, ModelConfig
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.logs.peak_flops import named_peak_flops
from gpt2xla.model.gpt2 import GPT2

RESULTS = Path(__file__).parent / "results"
CONTENDERS = Path(__file__).with_name("train_contenders.py")
KEEP_MEMORY = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368"
SMALL = {"num_layers": 6, "d_model": 384, "num_heads": 6, "seq_length": 256}
# Name: model, sequences per update on a CPU and on a GPU.
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "6x384": (SMALL, 16, 256),
    "124M": (PRESETS["gpt2"], 2, 64),
    "355M": (PRESETS["gpt2-medium"], 1, 32),
    "1.5B": (PRESETS["gpt2-xl"], 1, 8),
}


@dataclass(frozen=True)
class Contender:
    name: str
    kind: str
    peer: Path | None = None
    compile: bool = False
    tuned: bool = False


def contenders(args: argparse.Namespace) -> list[Contender]:
    found = [Contender("ours", "ours", compile=True), Contender("ours, not compiled", "ours")]
    if args.nanogpt:
        nano = Contender("nanoGPT", "nanoGPT", args.nanogpt)
        found += [replace(nano, name="nanoGPT, tuned", compile=True, tuned=True)]
        found += [nano] if args.device == "cpu" else []
    if args.trainer:
        trainer = Contender("Trainer", "Trainer")
        found += [trainer] if args.device == "cpu" else [replace(trainer, name="Trainer, compiled", compile=True)]
    if args.reference and args.device == "cpu":
        found += [Contender("reference", "reference", args.reference)]
    return found


class Running:
    """A contender in its process."""

    def __init__(self, contender: Contender, folder: Path, batch: int, precision: str, device: str, *more: str) -> None:
        environment = {**os.environ, "USE_TORCH_XLA": "0"}  # or transformers' Trainer would take XLA's CPU
        environment |= {"GLIBC_TUNABLES": KEEP_MEMORY} if contender.tuned else {}
        command = [sys.executable, "-W", "ignore", CONTENDERS, "--contender", contender.kind, "--folder", folder]
        command += ["--batch", batch, "--device", device]
        command += ["--peer", contender.peer] if contender.peer else []
        command += ["--precision", precision] if precision != "fp32" else []
        command += [*(f"--{name}" for name in ("compile", "tuned") if getattr(contender, name)), *more]
        self.name = contender.name
        self.process = subprocess.Popen(
            [str(part) for part in command], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def train(self, updates: int) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(f"{updates}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended early, with exit code {self.process.wait()}; its error stands above")
        return json.loads(answer)

    def end(self) -> None:
        self.process.communicate()


def measure(args: argparse.Namespace, chosen: list[Contender], size: str, precision: str) -> dict[str, Any]:
    options, *batches = SIZES[size]
    batch = args.batch or batches[args.device != "cpu"]
    # nanoGPT computes the exact GELU.
    config = ModelConfig(**{**options, "vocab_size": 50304, "activation": "gelu-exact"})
    model = GPT2(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        hf.save_model(Path(name), config, model.state_dict(), GenerationSettings.ending_with(None))
        flops = model.flops_per_token()
        del model
        profiled = Running(chosen[0], Path(name), batch, precision, args.device, "--profile")
        costs = profiled.answer()
        profiled.end()
        running = [Running(c, Path(name), batch, precision, args.device) for c in chosen]
        curves, rates = {}, {contender.name: [] for contender in running}
        for contender in running:  # the first turn also compiles
            is_compared = contender.name in ("ours", "nanoGPT, tuned")
            curves[contender.name] = contender.train(args.curve - 1 if is_compared else 0)["losses"]
            print(size, precision, f"{contender.name}: ready, loss {curves[contender.name][-1]:.4f}", flush=True)
        memory = {}
        for number in range(args.rounds):
            for contender in running:
                turn = contender.train(args.updates)
                rates[contender.name].append(batch * config.seq_length / statistics.median(turn["seconds"]))
                memory[contender.name] = turn["memory"]
            print(size, precision, number + 1, {n: round(values[-1]) for n, values in rates.items()}, flush=True)
        for contender in running:
            contender.end()
    peak = named_peak_flops(torch.cuda.get_device_name()) if args.device == "cuda" else None
    return {
        "batch": batch, "seq_length": config.seq_length, "flops_per_token": flops, "curves": curves,
        "tokens_per_second": rates, "largest_costs": costs, "memory_bytes": memory, "peak_flops": peak,
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['hardware']}; {results['date']}; torch {results['torch']}, transformers {results['transformers']}; "
        f"{results['rounds']} rounds of {results['updates']} timed updates; medians, in brackets the least and the most.",
        "",
        "| model, precision | | tokens/s | ours is faster by | MFU |",
        "|---|---|---|---|---|",
    ]
    notes = []
    for run in results["runs"]:
        costs = ", ".join(f"`{name[:60]}` {share:.0%}" for name, share in run["largest_costs"])
        notes.append(f"- {run['size']}, {run['precision']}: the three largest costs of our update: {costs}.")
        name, rates = f"{run['size']}, {run['precision']}", run["tokens_per_second"]
        for contender, values in rates.items():
            ratios = [own / theirs for own, theirs in zip(rates["ours"], values, strict=True)]
            peak = run["peak_flops"]
            mfu = f"{statistics.median(values) * run['flops_per_token'] / peak:.1%}" if peak else ""
            lines.append(f"| {name} | {contender} | {_spread(values, ',.0f')} | {_spread(ratios, '.2f')} | {mfu} |")
        for contender, theirs in run["curves"].items():
            if len(theirs) > 1 and contender != "ours":
                apart = max(abs(a - b) for a, b in zip(run["curves"]["ours"], theirs, strict=True))
                notes.append(
                    f"- {name}: over {len(theirs)} updates (loss {theirs[0]:.3f} to {theirs[-1]:.3f}) no loss of ours "
                    f"and of {contender} is further apart than {apart:.1e}."
                )
    return "\n".join([*lines, "", *notes]) + "\n"


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


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
    for size in args.sizes:
        for precision in precisions:
            results["runs"].append({"size": size, "precision": precision} | measure(args, chosen, size, precision))
            output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            output.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
