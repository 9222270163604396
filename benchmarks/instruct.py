#!/usr/bin/env python
"""The account of docs/instruct.md at small size: one base model, tuned on torch and on XLA, and how its answers end.

    python benchmarks/instruct.py base --text english.jsonl --folder instruct
    python benchmarks/instruct.py tune --records instruction-data.json --folder instruct

`base` trains a tokenizer and a model of 4 layers on the text of the demo and on `--text`, JSON lines of English passages.
`tune` splits the records 9 to 1, tunes the base on both runtimes with the same options, compares their losses, and lets the
better checkpoint answer the prompts held out, greedily and sampled. It writes what it ran and found to instruct.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SEQ_LENGTH = 512
ENDS = ("<|im_start|>", "<|im_end|>")
# For a model and data this small; an update of 4 rows sees about 38 conversations.
TUNING = shlex.split("--sequences-per-update 4 --learning-rate 1e-3 --epochs 8 --valid-interval 14 --save-interval 0")
# Runs one of our programs in its own process and prints how many programs XLA compiled.
COUNTED = (
    "from gpt2xla.commands.generate import main; main(); import torch_xla.debug.metrics as met; print('programs:', \
(met.metric_data('CompileTime') or [0])[0])"
)


class Account:
    """Commands in the order in which they ran, and how long each took."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def run(self, program: str, *arguments: object, **environment: str) -> str:
        """Run a program of this repository, and return what it printed. Exits where it fails."""
        words = [str(argument) for argument in arguments]
        command = [sys.executable, *(["-c", COUNTED] if program == "counted" else [str(ROOT / program)]), *words]
        set_variables = " ".join(f"{name}={value}" for name, value in environment.items())
        name = "generate.py" if program == "counted" else program
        shown = f"{set_variables} python {name} {shlex.join(words)}".strip()
        print(f"$ {shown}", flush=True)
        start = time.perf_counter()
        # Both outputs are one text: what a program prints to a terminal.
        finished = subprocess.run(
            command,
            env=os.environ | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if finished.returncode:
            sys.exit(f"{finished.stdout[-4000:]}\nexit code {finished.returncode}")
        self.lines.append(f"{shown}  # {time.perf_counter() - start:,.0f} s")
        print(finished.stdout, flush=True)
        return finished.stdout


def base(args: argparse.Namespace, account: Account) -> None:
    """Tokenizer, shards and the base model."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from demo import TEXT

    folder = args.folder
    account.run(
        "scripts/train_tokenizer.py", TEXT[0], TEXT[1], args.text, *TEXT[2:], "--output-dir", folder / "tokenizer",
        "--vocab-size", 4096, "--special-tokens", *ENDS,
    )  # fmt: skip
    options = "--tokenizer", folder / "tokenizer", "--output-dir"
    account.run("scripts/prepare_text.py", "--input", args.text, *options, folder / "english", "--test-fraction", 0.03)
    account.run("scripts/prepare_text.py", *TEXT, *options, folder / "code")
    account.run(
        "run_pretrain.py", "--train-dir", f"{folder}/english/train=0.4", f"{folder}/code/train=0.6", "--valid-dir",
        folder / "english" / "test", "--checkpoints-dir", folder / "base", "--vocab-size", 4096, "--seq-length", SEQ_LENGTH,
        "--d-model", 256, "--num-layers", 4, "--num-heads", 4, "--train-batch-size", 8, "--gradient-accum-step", 1,
        "--train-steps", args.steps, "--valid-interval", 200, "--valid-steps", "all", "--recipe", "fast", "--shuffle",
        "--mixed-precision", "bf16", "--save-interval", 200,
    )  # fmt: skip


def tune(args: argparse.Namespace, account: Account) -> None:
    """Tune on both runtimes, and let the tuned model answer."""
    folder = args.folder
    prepared = account.run(
        "scripts/prepare_chat.py", "--input", args.records, "--tokenizer", folder / "tokenizer", "--chat-template", "chatml",
        "--seq-length", SEQ_LENGTH, "--test-fraction", 0.1, "--seed", 1, "--output-dir", folder / "chat-data",
    )  # fmt: skip
    options = (
        "--config", ROOT / "configs/instruct.yaml", "--from-checkpoint", folder / "base",
        "--train-dir", folder / "chat-data", *args.options,
    )  # fmt: skip
    runs = {}
    for name, program, where in (
        ("torch", "run_pretrain.py", {}),
        ("XLA:CPU", "run_pretrain_xla.py", {"PJRT_DEVICE": "CPU"}),
    ):
        checkpoints = folder / f"chat-{name.split(':')[0].lower()}"
        account.run(program, *options, "--checkpoints-dir", checkpoints, **where)
        runs[name] = Run(checkpoints)
    questions = folder / "questions.jsonl"
    held_out = held_out_prompts(folder / "chat-data" / "test")
    questions.write_text("".join(f"{json.dumps([{'role': 'user', 'content': text}])}\n" for text in held_out))
    answers = {}
    for way, flags in (
        ("greedy", ("--temperature", 0)),
        ("sampled", ("--temperature", 0.8, "--top-k", 40, "--seed", 1)),
    ):
        for penalty in (1.0, 1.2):
            for device in ("cpu", "xla") if (way, penalty) == ("greedy", 1.0) else ("cpu",):
                output = folder / f"answers-{way}-{penalty}-{device}.jsonl"
                environment = {"PJRT_DEVICE": "CPU"} if device == "xla" else {}
                printed = account.run(
                    "counted" if device == "xla" else "generate.py", "--model", f"{folder}/chat-torch@best", "--chat",
                    "--prompts-file", questions, "--max-new-tokens", 200, *flags, "--repetition-penalty", penalty,
                    "--device", device, "--batch-size", 16, "--output", output, **environment,
                )  # fmt: skip
                programs = re.findall(r"programs: (\d+)", printed)
                answers[way, penalty, device] = [json.loads(line) for line in output.read_text().splitlines()], programs
    page = report(args, account, prepared, runs, answers)
    args.output.write_text(page)
    print(page)


class Run:
    """What a run has written to its metrics.jsonl."""

    def __init__(self, folder: Path) -> None:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        self.valid = {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}
        self.programs = max(line.get("compiles", 0) for line in lines)

    @property
    def best(self) -> int:
        return min(self.valid, key=lambda step: self.valid[step])


def held_out_prompts(test: Path) -> list[str]:
    """Return the questions of a split of masked rows in ChatML, as its ids spell them."""
    from gpt2xla.data.shards import TokenStream
    from gpt2xla.data.tokenizer import load_tokenizer

    stream = TokenStream(test)
    text = load_tokenizer(str(test)).decode(stream.read(0, stream.length).tolist())
    return re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", text, flags=re.DOTALL)


def report(
    args: argparse.Namespace, account: Account, prepared: str, runs: dict[str, Run], answers: dict[Any, Any]
) -> str:
    """Return the page of results."""
    own, other = runs["torch"], runs["XLA:CPU"]
    common = sorted(own.losses.keys() & other.losses.keys())
    apart = max(abs(own.losses[step] - other.losses[step]) for step in common)
    valid_apart = max(abs(own.valid[step] - other.valid[step]) for step in own.valid.keys() & other.valid.keys())
    lines = [
        "# Instruct tuning at small size", "",
        f"{args.hardware}; {date.today()}; torch {torch.__version__}; fp32. The base has 4 layers of width 256, 4,096 ids "
        f"and sequences of {SEQ_LENGTH}. From `benchmarks/instruct.py`.", "",
        "| | updates | first and last loss | validation loss: first, best, last | best after | programs compiled |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, run in runs.items():
        first, last = min(run.losses), max(run.losses)
        shown = ", ".join(f"{run.valid[step]:.4f}" for step in (min(run.valid), run.best, max(run.valid)))
        lines.append(
            f"| {name} | {len(run.losses)} | {run.losses[first]:.4f}, {run.losses[last]:.4f} | {shown} | {run.best} | "
            f"{run.programs or ''} |"
        )
    lines += [
        "", f"Of {len(common)} updates no two losses of the runtimes are further apart than {apart:.1e}, and no two "
        f"validation losses than {valid_apart:.1e}.", "",
        "| answers to prompts held out | end by themselves | tokens: median, most | programs compiled |",
        "|---|---|---|---|",
    ]  # fmt: skip
    for (way, penalty, device), (found, programs) in answers.items():
        ended = sum(answer["finish_reasons"][0] == "stop" for answer in found)
        lengths = sorted(answer["new_tokens"][0] for answer in found)
        lines.append(
            f"| {way}, repetition penalty {penalty}, {device} | {ended} of {len(found)} ({ended / len(found):.1%}) | "
            f"{lengths[len(lengths) // 2]}, {lengths[-1]} | {programs[0] if programs else ''} |"
        )
    if (greedy := answers.get(("greedy", 1.0, "xla"))) is not None:
        same = sum(a["texts"] == b["texts"] for a, b in zip(greedy[0], answers["greedy", 1.0, "cpu"][0], strict=True))
        lines += ["", f"On XLA {same} of {len(greedy[0])} greedy answers are the same text as on torch."]
    lines += ["", "Preparation printed:", "", "```", prepared.strip(), "```", "", "Commands, and how long each took:"]
    page = "\n".join([*lines, "", "```bash", *account.lines, "```", ""])
    for path, name in {str(ROOT): ".", str(args.folder): "instruct", str(args.records): args.records.name}.items():
        page = page.replace(path, name)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    first = parts.add_parser("base", help="train tokenizer and base model")
    first.add_argument("--text", type=Path, required=True, help="JSON lines of English passages, their field is `text`")
    first.add_argument("--steps", type=int, default=700)
    second = parts.add_parser("tune", help="tune it, and let it answer")
    second.add_argument("--records", type=Path, required=True, help="a JSON file of alpaca records")
    second.add_argument("--hardware", default=f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}")
    second.add_argument("--output", type=Path, default=Path("instruct.md"))
    second.add_argument(
        "options",
        nargs="*",
        default=TUNING,
        help="after --: options of the training beside those of configs/instruct.yaml",
    )
    for part in (first, second):
        part.add_argument("--folder", type=Path, default=Path("instruct"), help="where data and checkpoints go")
    args = parser.parse_args()
    {"base": base, "tune": tune}[args.part](args, Account())


if __name__ == "__main__":
    main()
