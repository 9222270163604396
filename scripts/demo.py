#!/usr/bin/env python
"""The whole way in a few minutes on one CPU: raw text -> tokenizer -> shards -> training on XLA -> generated text.

The text comes with every Python: the sources and documentation of its standard library, read where they are.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from gpt2xla.cli import parse_options
from gpt2xla.config import option
from gpt2xla.errors import InputError
from gpt2xla.processes.exits import exit_code

ROOT = Path(__file__).resolve().parent.parent
# The options that name the text.
TEXT = (
    "--input", sysconfig.get_path("stdlib"), "--suffixes", ".py", ".txt", ".rst",
    "--exclude", "site-packages", "test", "tests",
)  # fmt: skip


@dataclass(frozen=True)
class DemoConfig:
    """Demo"""

    output_dir: str = option(
        "demo", "folder for data and checkpoints; data made before is kept, training starts from scratch", is_path=True
    )
    steps: int = option(800, "training steps, of 2,048 tokens each")


def main() -> None:
    options = parse_options(DemoConfig, "Run the whole way from raw text to generated text on this machine's CPU.")
    if options.steps < 2:
        raise InputError(f"--steps {options.steps}: choose a number of at least 2")
    folder = Path(options.output_dir)
    checkpoints = folder / "checkpoints"
    data = prepare_corpus(folder)
    shutil.rmtree(checkpoints, ignore_errors=True)
    run(
        "run_pretrain_xla.py", "--train-dir", data / "train", "--valid-dir", data / "test", "--shuffle",
        "--checkpoints-dir", checkpoints, "--vocab-size", 4096, "--seq-length", 128, "--d-model", 128, "--num-layers", 4,
        "--num-heads", 4, "--train-batch-size", 16, "--gradient-accum-step", 1, "--learning-rate", 0.004,
        "--min-lr", 0.0004, "--warmup-steps", min(50, options.steps // 2), "--decay-steps", options.steps,
        "--train-steps", options.steps, "--eval-batch-size", 16, "--valid-steps", 40, "--valid-interval", 200,
        "--save-interval", 400, "--use-syncfree-optim", PJRT_DEVICE="CPU",
    )  # fmt: skip
    run(
        "generate.py", "--model", checkpoints, "--prompt", "def read(self, size):\n", "--max-new-tokens", 120,
        "--temperature", 0.8, "--top-k", 40, "--seed", 1,
    )  # fmt: skip
    report(checkpoints, data / "test")


def prepare_corpus(folder: Path) -> Path:
    """Return the folder of shards, train/ and test/, of 4,096 ids. It is made unless it exists."""
    tokenizer, data = folder / "tokenizer", folder / "data"
    if not (tokenizer / "tokenizer.json").exists():
        run("scripts/train_tokenizer.py", *TEXT, "--output-dir", tokenizer, "--vocab-size", 4096)
    if not (data / "test").exists():
        shutil.rmtree(data, ignore_errors=True)
        run("scripts/prepare_text.py", *TEXT, "--output-dir", data, "--tokenizer", tokenizer)
    return data


def run(program: str, *arguments: object, **environment: str) -> None:
    """Print a command and run it; if it fails, the demo exits with its exit code."""
    words = [program, *map(str, arguments)]
    shown = [f"{name}={value}" for name, value in environment.items()] + ["python"]
    print("\n$", *shown, *(repr(word) if set(word) & set(" \n(") else word for word in words), flush=True)
    finished = subprocess.run([sys.executable, ROOT / program, *words[1:]], env=os.environ | environment, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def report(checkpoints: Path, test: Path) -> None:
    """Print the validation loss beside that of a model that ignores context; the trained one must be below it."""
    from gpt2xla.data.inspection import contents
    from gpt2xla.data.shards import TokenStream
    from gpt2xla.logs.sinks import METRICS_FILE

    losses = [json.loads(line).get("valid_loss") for line in (checkpoints / METRICS_FILE).read_text().splitlines()]
    loss = [value for value in losses if value is not None][-1]
    entropy = contents(TokenStream(test), vocab_size=None, eot_id=None).unigram_entropy
    print(
        f"\nunigram entropy of the test tokens  {entropy:.4f} nats per token (the loss of a model that ignores context)"
    )
    print(f"validation loss of the trained GPT-2 {loss:.4f} nats per token")
    if loss >= entropy:
        sys.exit("the model has not learned to use context")


if __name__ == "__main__":
    sys.exit(exit_code(main))
