#!/usr/bin/env python
"""Does it train right on a GPU, and how fast? One command, and at most nine minutes on one H100 or H200.

    python benchmarks/gpu.py --nanogpt nanoGPT/model.py

Its steps are in the order of their worth: numbers beside the CPU's, beside float64 and beside nanoGPT's; repeated and
resumed runs; rates beside nanoGPT and transformers' Trainer; generation; single kernels. Each step is a process with a limit
of time. A step that fails or takes too long does not keep the others from running, and one for which no time is left is left
out. All that is known is written after each step. Needs no network; the Trainer needs accelerate.

Exit codes: 0 all is right; 1 a check failed; 2 the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CORRECTNESS, SPEED = HERE / "gpu_correctness.py", HERE / "gpu_speed.py"
MINUTES = 9.0


@dataclass(frozen=True)
class Step:
    """`seconds` is its limit and `least` what it needs to tell anything, both in a check of nine minutes."""

    name: str
    program: Path
    seconds: int
    least: int = 15


STEPS = (
    Step("environment", CORRECTNESS, 40),
    Step("kernels", CORRECTNESS, 75),
    Step("side-by-side", CORRECTNESS, 110, least=45),
    Step("rates-124M", SPEED, 140, least=60),
    Step("repeats", CORRECTNESS, 110, least=45),
    Step("rates-batch-8", SPEED, 90, least=40),
    Step("rates-trainer", SPEED, 110, least=60),
    Step("single-kernels", SPEED, 40),
    Step("generation", SPEED, 90, least=30),
    Step("out-of-memory", CORRECTNESS, 60, least=30),
    Step("save", SPEED, 40, least=25),
    Step("rates-355M", SPEED, 130, least=80),
    Step("rates-1.5B", SPEED, 110, least=75),
    Step("rates-774M", SPEED, 80, least=50),
)


class Check:
    """The steps that were made, what they found, and the time that is left."""

    def __init__(self, minutes: float, nanogpt: Path | None, work: Path, out: Path, only: list[str]) -> None:
        self.only = only  # named in the results' file, so that some steps do not overwrite the results of all
        self.start, self.minutes, self.nanogpt, self.work, self.out = time.monotonic(), minutes, nanogpt, work, out
        self.written = out  # the newest page
        self.results: dict[str, Any] = {"date": str(date.today()), "environment": {}, "steps": [], "reports": []}

    def seconds_left(self) -> float:
        return self.minutes * 60 - 5 - (time.monotonic() - self.start)

    def make(self, step: Step) -> None:
        """Run a step, and write what is known then."""
        scale = max(1.0, self.minutes / MINUTES)
        began, left = time.monotonic(), self.seconds_left()
        if left < step.least * scale:
            self.note(step, "left out: no time", 0.0)
            return
        seconds = min(step.seconds * scale, left)
        command = [sys.executable, step.program, step.name, "--work", self.work, "--seconds", seconds]
        command += ["--nanogpt", self.nanogpt] if self.nanogpt else []
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # this tree, installed or not
        mark = f"{os.getpid()}-{step.name}"
        environment = {
            **os.environ, "GPU_CHECK_STEP": mark, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"), "USE_TORCH_XLA": "0", "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        said, log = self.work / f"{step.name}.out", self.work / f"{step.name}.log"
        status = "stopped"
        try:
            with said.open("w") as stdout, log.open("w") as stderr:
                process = subprocess.Popen(
                    [str(part) for part in command],
                    env=environment, cwd=self.work, stdout=stdout, stderr=stderr, start_new_session=True,
                )  # fmt: skip
                code = process.wait(seconds)
                status = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {time.monotonic() - began:.0f} s"
        finally:
            kill_all_of(mark)
            for line in said.read_text(errors="replace").splitlines():
                with suppress(ValueError, TypeError):  # a line that is no report, or was cut off
                    if "report" in (report := json.loads(line)):
                        self.take(step, report)
            end = log.read_text(errors="replace").strip().splitlines()[-3:] if status != "done" else []
            self.note(step, status, time.monotonic() - began, " | ".join(end)[-600:])

    def take(self, step: Step, report: dict[str, Any]) -> None:
        if report["report"] == "environment":
            self.results["environment"] = report
        elif report["report"] == "rates":  # each replaces the one of the round before
            others = [r for r in self.results["reports"] if (r["report"], r["step"]) != ("rates", step.name)]
            self.results["reports"] = [*others, {"step": step.name, **report}]
        else:
            self.results["reports"].append({"step": step.name, **report})
        if report["report"] == "check":
            print("PASS" if report["passed"] else "FAIL", report["what"], flush=True)

    def note(self, step: Step, status: str, seconds: float, error: str = "") -> None:
        self.results["steps"].append({"step": step.name, "status": status, "seconds": seconds, "error": error})
        print(f"[{time.monotonic() - self.start:.0f} s] {step.name}: {status} {error}".rstrip(), flush=True)
        self.write()

    def reports(self, kind: str) -> list[dict[str, Any]]:
        return [report for report in self.results["reports"] if report["report"] == kind]

    def failures(self) -> list[str]:
        """Return what is not right: checks that failed, and steps with checks that did not end."""
        failed = [report["what"] for report in self.reports("check") if not report["passed"]]
        programs = {step.name: step.program for step in STEPS}
        unfinished = [
            f"{step['step']}: {step['status']}"
            for step in self.results["steps"]
            if programs[step["step"]] == CORRECTNESS and step["status"].startswith(("failed", "stopped"))
        ]
        return failed + unfinished

    def write(self) -> None:
        from gpu_page import page  # which imports torch

        if card := self.results["environment"].get("card"):
            name = re.sub(r"\W+", "_", card.lower().replace("nvidia", "")).strip("_")
            name = "-".join([name, *self.only])
            self.out.mkdir(parents=True, exist_ok=True)
            for suffix, text in (("json", json.dumps(self.results, indent=1) + "\n"), ("md", page(self.results))):
                self.written = self.out / f"gpu_{name}.{suffix}"
                partial = self.out / f".gpu_{name}.{suffix}.partial"
                partial.write_text(text)
                partial.replace(self.written)


def kill_all_of(mark: str) -> None:
    """End every process that a step has started, also those that left its process group, as compilers' workers do."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"GPU_CHECK_STEP={mark}\0".encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:  # it has ended, or is someone else's
            continue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--nanogpt", type=Path, metavar="PATH", help="karpathy/nanoGPT's model.py; without it nothing is compared"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="the whole check takes at most so long (default: 9)"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder for the results (default: benchmarks/results)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=[s.name for s in STEPS], metavar="STEP", help="make these steps alone"
    )
    args = parser.parse_args()
    if not 0 < args.minutes < 1000:
        parser.error(f"--minutes {args.minutes}: choose a number above 0")
    if args.nanogpt and not (args.nanogpt.name == "model.py" and args.nanogpt.is_file()):
        parser.error(f"--nanogpt {args.nanogpt}: there is no such model.py; name nanoGPT's")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}; name a folder to write to")
    sys.path.insert(0, str(HERE.parent))  # for a tree that is not installed
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        nanogpt = args.nanogpt.resolve().parent if args.nanogpt else None
        checked = Check(args.minutes, nanogpt, Path(work), args.out.resolve(), args.only or [])
        for step in STEPS:
            if step.name == "environment" or not args.only or step.name in args.only:
                checked.make(step)
            if not checked.results["environment"].get("card"):
                ended = checked.results["steps"][0]
                why = (
                    ended["error"] or ended["status"]
                    if ended["status"] != "done"
                    else "torch finds no CUDA device here"
                )
                print(f"gpu.py: error: {why}", file=sys.stderr)
                return 2
    from gpu_page import summary

    failures, checks = checked.failures(), len(checked.reports("check"))
    print(f"\n{summary(checked.results)}\n")
    for failure in failures:
        print("FAIL", failure)
    print(
        f"{len(failures)} failures beside {checks} checks"
        if failures
        else f"all {checks} checks passed"
        if checks
        else "no checks",
        end="; ",
    )
    print(checked.written)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
