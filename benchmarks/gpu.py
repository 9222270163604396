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
import statistics
import subprocess
import sys
import tempfile
import time
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
    Step("rates-124M", SPEED, 200, least=60),
    Step("repeats", CORRECTNESS, 110, least=45),
    Step("rates-batch-8", SPEED, 90, least=40),
    Step("single-kernels", SPEED, 40),
    Step("generation", SPEED, 90, least=30),
    Step("rates-1.5B", SPEED, 75, least=40),
    Step("rates-355M", SPEED, 120, least=60),
    Step("out-of-memory", CORRECTNESS, 60, least=30),
    Step("save", SPEED, 40, least=25),
    Step("rates-774M", SPEED, 60, least=40),
)


class Check:
    """The steps that were made, what they found, and the time that is left."""

    def __init__(self, minutes: float, nanogpt: Path | None, work: Path, out: Path) -> None:
        self.start, self.minutes, self.nanogpt, self.work, self.out = time.monotonic(), minutes, nanogpt, work, out
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
                if line.startswith('{"report"'):
                    self.take(step, json.loads(line))
            end = log.read_text(errors="replace").strip().splitlines()[-3:] if status != "done" else []
            self.note(step, status, time.monotonic() - began, " | ".join(end)[-600:])

    def take(self, step: Step, report: dict[str, Any]) -> None:
        if report["report"] == "environment":
            self.results["environment"] = report
        elif report["report"] == "rates":  # each replaces the one of the round before
            key = (report["run"]["size"], report["run"]["batch"])
            others = [r for r in self.results["reports"] if r["report"] != "rates" or _key(r) != key]
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
        card = self.results["environment"].get("card")
        if card:
            name = re.sub(r"\W+", "_", card.lower().replace("nvidia", "")).strip("_")
            self.out.mkdir(parents=True, exist_ok=True)
            for suffix, text in (("json", json.dumps(self.results, indent=1)), ("md", self.markdown())):
                partial = self.out / f".gpu_{name}.{suffix}.partial"
                partial.write_text(text + "\n")
                partial.replace(self.out / f"gpu_{name}.{suffix}")

    def markdown(self) -> str:
        from train_turns import largest_costs, spread, table

        e = self.results["environment"]
        lines = [
            f"{e['card']} ({e['memory_GB']:.0f} GB), driver {e['driver']}; {self.results['date']}; torch {e['torch']}, "
            f"CUDA {e['cuda']}, cuDNN {e['cudnn']}, Triton {e['triton']}, transformers {e['transformers']}; Python "
            f"{e['python']}, {e['cores']} cores.",
            "",
        ]
        if checks := self.reports("check"):
            right = sum(report["passed"] for report in checks)
            lines += [f"## Right or wrong: {right} of {len(checks)} checks passed", ""]
            lines += [f"- {'passed' if r['passed'] else '**failed**'}: {r['what']}" for r in checks] + [""]
        if runs := [report["run"] for report in self.reports("rates")]:
            lines += [
                "## Training",
                "",
                "Medians of rounds in which all take turns; in brackets the least and the most.",
                "",
            ]
            lines += [table(runs)]
            for run in runs:
                name = f"{run['size']}, {run['batch']} x {run['seq_length']}"
                for who, memory in run["memory_bytes"].items():
                    host, first = run["host_seconds_per_update"][who], run["first_update_seconds"][who]
                    lines.append(
                        f"- {name}, {who}: {memory / 1e9:.1f} GB at most, {host * 1e3:.1f} ms of the host per update, first "
                        f"update after {first:.0f} s."
                    )
                for who, profile in run["profiles"].items():
                    if largest_costs(profile):
                        lines.append(
                            f"- {name}, {who}: {profile['seconds'] * 1e3:.1f} ms in {profile['launches']:.0f} kernels per "
                            "update, by the profiler."
                        )
            lines += [
                "- nanoGPT's compiled model returns its logits too, as its train.py does it, and fills their gradient.",
                "",
            ]
        if generated := self.reports("generation"):
            lines += ["## Generation", "", "| | batch | tokens/s | first call, s |", "|---|---|---|---|"]
            for r in generated:
                rate = spread(r["tokens_per_second"], ",.0f")
                lines.append(f"| {r['program']} | {r['batch']} | {rate} | {r['first_seconds']:.1f} |")
            lines.append("")
        for r in self.reports("save"):
            seconds = statistics.median(r["seconds"][1:])
            lines += [f"A checkpoint of {r['bytes'] / 1e9:.1f} GB stops training for {seconds:.2f} s.", ""]
        if kernels := self.reports("kernel"):
            lines += ["## Single kernels", "", "| | ms | TFLOP/s | TB/s |", "|---|---|---|---|"]
            for r in kernels:
                if "error" in r:
                    lines.append(f"| {r['name']} | {r['error']} | | |")
                else:
                    rates = (
                        f"{r['tflops']:.0f}" if r["tflops"] else "",
                        f"{t:.2f}" if (t := r["terabytes_per_second"]) else "",
                    )
                    lines.append(f"| {r['name']} | {r['ms']:.3f} | {' | '.join(rates)} |")
            lines.append("")
        lines += ["## Steps", ""]
        lines += [
            f"- {s['step']}: {s['status']}, {s['seconds']:.0f} s. {s['error']}".rstrip() for s in self.results["steps"]
        ]
        lines += [f"- {report['text']}." for report in self.reports("note")]
        return "\n".join(lines)


def _key(report: dict[str, Any]) -> tuple[str, int]:
    return report["run"]["size"], report["run"]["batch"]


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
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is not a folder")
    sys.path.insert(0, str(HERE.parent))  # for a tree that is not installed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        nanogpt = args.nanogpt.resolve().parent if args.nanogpt else None
        checked = Check(args.minutes, nanogpt, Path(work), args.out.resolve())
        for step in STEPS:
            if step.name == "environment" or not args.only or step.name in args.only:
                checked.make(step)
            if not checked.results["environment"].get("card"):
                print("gpu.py: error: torch finds no CUDA device here", file=sys.stderr)
                return 2
    failures = checked.failures()
    print(f"\n{checked.markdown()}\n")
    for failure in failures:
        print("FAIL", failure)
    print(f"{len(failures)} of {len(checked.reports('check'))} checks failed" if failures else "all checks passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
