#!/usr/bin/env python
"""How many of N short runs of several CPU replicas, one after another, end well and with the same losses.

    python benchmarks/replicas_reliability.py --runs 50 --replicas 2

Prints a line for each run that does not, and the count. Exit code 0 if all did.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RUN = """--vocab-size 97 --seq-length 16 --d-model 32 --num-layers 1 --num-heads 2 --train-batch-size 4 --eval-batch-size 4
--gradient-accum-step 2 --valid-steps 2 --warmup-steps 2 --train-steps 5 --decay-steps 5 --learning-rate 0.01""".split()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300, help="a run that takes longer counts as hung")
    options = parser.parse_args()
    good, seconds, expected = 0, [], None
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "test"):
            (Path(folder) / split).mkdir()
            np.save(Path(folder) / split / "0.npy", (np.arange(4000) ** 2 % 97).astype(np.uint16))
        for number in range(1, options.runs + 1):
            start = time.monotonic()
            problem, losses = one_run(Path(folder), number, options)
            seconds.append(time.monotonic() - start)
            expected = expected or losses
            if not problem and losses != expected:
                problem = f"losses {losses}, in the first run {expected}"
            good += not problem
            if problem:
                print(f"run {number}: {problem}", flush=True)
    print(
        f"{good} of {options.runs} runs of {options.replicas} replicas ended well, in {np.median(seconds):.1f} s (median)"
    )
    return 0 if good == options.runs else 1


def one_run(folder: Path, number: int, options: argparse.Namespace) -> tuple[str, list[float]]:
    """What went wrong, if anything, and the losses."""
    output = folder / f"run-{number}"
    data = ["--train-dir", str(folder / "train"), "--valid-dir", str(folder / "test"), "--checkpoints-dir", str(output)]
    try:
        result = subprocess.run(
            [sys.executable, "run_pretrain_xla.py", *RUN, *data], cwd=ROOT, capture_output=True, text=True, check=False,
            env=os.environ | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(options.replicas)}, timeout=options.seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"hung for {options.seconds:.0f} s", []
    if result.returncode:
        return f"exit code {result.returncode}: {result.stderr[-500:]}", []
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return "", [line["loss"] for line in lines if "loss" in line]


if __name__ == "__main__":
    sys.exit(main())
