"""How a step of gpu.py is called, and how it reports: each report is a line of JSON on standard output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """`work` is a folder for files that only this check needs, `seconds` the time after which the step is stopped."""

    work: Path
    seconds: float
    nanogpt: Path | None  # the folder of nanoGPT's model.py


def report(kind: str, **values: Any) -> None:
    print(json.dumps({"report": kind, **values}), flush=True)


def check(passed: bool, what: str) -> None:
    """Report whether something is right. `what` says what, with the numbers that decided."""
    report("check", passed=bool(passed), what=what)


def run(steps: dict[str, Callable[[Job], None]]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=steps)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--nanogpt", type=Path)
    args = parser.parse_args()
    steps[args.step](Job(args.work, args.seconds, args.nanogpt))
