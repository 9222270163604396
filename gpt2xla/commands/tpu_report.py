"""What this machine's TPU makes of gpt2xla, in ten minutes: `python scripts/tpu_report.py`, and paste what it prints.

A small model is trained whose losses are known, then GPT-2 (124M) for its speed, through run_pretrain_xla.py's own runner
and loop, on all devices. Nothing is downloaded, and no file is left behind. Exits with 1 if a part fails or the losses
differ.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpt2xla import __version__
from gpt2xla.cli import parse_options
from gpt2xla.config import RunConfig, option
from gpt2xla.errors import InputError, RunFailed, user_error
from gpt2xla.files import write_whole
from gpt2xla.runtime.xla.environment import notebook_host, prepare, tpu_chips
from gpt2xla.runtime.xla.versions import installed, misfits, release_for, why_no_kernels
from gpt2xla.tpu_check.curve import LEAST_STEPS, STEPS, known_run, read_lines
from gpt2xla.tpu_check.report import Part, block, numbers, sequences_per_device, speed, speed_run

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("torch", "torch_xla", "libtpu", "jax", "jaxlib")
PROGRAM = (sys.executable, "-m", "gpt2xla.commands.measured_run")
_SECONDS_TO_END = 20
_LINES_OF_A_FAILURE = 5


@dataclass(frozen=True)
class ReportConfig:
    """Report"""

    json: str | None = option(None, "file for all numbers of the report", is_path=True)
    gpt2: bool | None = option(
        None, "train GPT-2 (124M) too, whose speed the report is about (default: not on a CPU, where it takes hours)"
    )
    steps: int = option(STEPS, "updates of each model")
    attention: Literal["auto", "chunked"] = option(
        "auto", "as in run_pretrain_xla.py; chunked does without our kernels"
    )
    spmd: bool = option(False, "as in run_pretrain_xla.py: one process, whose program XLA divides over the devices")
    minutes: float = option(15.0, "end after so many minutes, and print what is known by then")


def main() -> None:
    options = parse_options(ReportConfig, "Report what this machine's TPU makes of gpt2xla, as a block to paste.")
    if not options.minutes > 0:
        raise InputError(f"--minutes {options.minutes:g}: choose a number above 0")
    if not LEAST_STEPS <= options.steps <= STEPS:
        raise InputError(f"--steps {options.steps}: choose from {LEAST_STEPS} to {STEPS}")
    if options.json:
        with user_error(f"--json {options.json}"):
            Path(options.json).touch()
    if not os.environ.get("PJRT_DEVICE") and tpu_chips():
        os.environ["PJRT_DEVICE"] = "TPU"
    prepare(dict(os.environ))  # a wrong environment is one line now, not a failed part later
    if wrong := list(misfits(installed(PACKAGES), uses_tpu=os.environ["PJRT_DEVICE"] == "TPU")):
        raise InputError(wrong[0])
    # As with Ctrl-C, the run ends, its folder is removed, and what is known is printed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    report = {"date": f"{datetime.datetime.now(tz=datetime.timezone.utc):%Y-%m-%d %H:%M} UTC", **machine(), "parts": []}
    try:
        measure(report, options)
    finally:
        if options.json:
            write_whole(Path(options.json), json.dumps(report, indent=1) + "\n")
        print(f"\npaste this, from ``` to ```:\n\n{block(report)}", flush=True)
    if wrong := [
        f"{part['title']}: {part['failed'] or part['verdict']}" for part in report["parts"] if not part["is_good"]
    ]:
        raise RunFailed(f"{wrong[0]}; the block above says so, paste it all the same")


def machine() -> dict[str, Any]:
    """Return versions and host, for the report."""
    versions = {"gpt2xla": f"{__version__} ({_commit()})", "python": platform.python_version(), **installed(PACKAGES)}
    return {
        "versions": versions, "notebook": notebook_host(os.environ), "host_cores": len(os.sched_getaffinity(0)),
        "why_no_kernels": why_no_kernels(release_for(versions), versions.get("jax")),
    }  # fmt: skip


def measure(report: dict[str, Any], options: ReportConfig) -> None:
    """Add parts to `report`, each as soon as something is known of it."""
    until = time.monotonic() + options.minutes * 60
    with tempfile.TemporaryDirectory(prefix="gpt2xla-", ignore_cleanup_errors=True) as name:
        for attention in (options.attention, "chunked"):
            folder = Path(name) / attention
            config = known_run(folder, options.steps, attention=attention)
            part = new_part(report, "numbers" + ("" if attention == "auto" else " without flash attention"))
            run(part, config, options, folder, until, numbers)
            # Our kernels failed or are wrong? Then it is worth knowing whether all else is right.
            if part["is_good"] or "flash" not in part["facts"].get("kernels", ""):
                break
        first, facts = report["parts"][0], part["facts"]
        if options.gpt2 if options.gpt2 is not None else facts.get("type", os.environ["PJRT_DEVICE"]) != "CPU":
            attention = "chunked" if first["failed"] else options.attention
            part = new_part(report, "speed of GPT-2 (124M)")
            if not facts:
                part["failed"] = "not tried, as the devices did not start"
                return
            folder, share = Path(name) / "speed", sequences_per_device(facts["kind"])
            config = speed_run(folder, options.steps, share, facts["devices"], attention=attention)
            run(part, config, options, folder, until, speed)


def new_part(report: dict[str, Any], title: str) -> Part:
    part: Part = {"title": title, "facts": {}, "lines": [], "failed": "it did not end", "is_good": False}
    report["parts"].append(part)
    return part


def run(
    part: Part, config: RunConfig, options: ReportConfig, folder: Path, until: float, judge: Callable[[Part], Part]
) -> None:
    """Train in a process of its own, and put into `part` how that went, also if it is interrupted: facts, lines, what
    failed, and what `judge` makes of it. Ctrl-C reaches only this process, which then ends the other."""
    print(f"\n{part['title']}: {config.train.train_steps} updates ...", file=sys.stderr, flush=True)
    facts, given = folder / "facts.json", folder / "run.json"
    given.write_text(json.dumps(config.given_options()))
    flags = ["--config", str(given), "--use-syncfree-optim", "--compile-cache", ""]  # so that compiles are measured
    flags += ["--spmd"] if options.spmd else []
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TMPDIR": str(folder), "TPU_LOG_DIR": str(folder)}
    start, said = time.monotonic(), deque[str](maxlen=100)
    try:
        with _started([*PROGRAM, str(facts), *flags], environment) as process:
            is_late = threading.Event()

            def end_late(process: subprocess.Popen[str] = process) -> None:
                is_late.set()
                _end(process)

            alarm = threading.Timer(max(until - start, 0), end_late)
            alarm.start()
            try:
                for line in process.stdout or ():
                    print(line, end="", file=sys.stderr, flush=True)
                    said.append(line.rstrip())
                code = process.wait()
            finally:
                alarm.cancel()
        part["failed"] = "time was over (--minutes)" if is_late.is_set() else _why(code, said)
    except BaseException as error:
        part["failed"] = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else repr(error)
        raise
    finally:
        part["seconds"] = round(time.monotonic() - start, 1)
        part["facts"] = json.loads(facts.read_text()) if facts.exists() else {}
        part["lines"] = read_lines(folder)
        if part["failed"]:
            part["last_words"] = [line for line in said if line][-_LINES_OF_A_FAILURE:]
        part |= judge(part)


@contextlib.contextmanager
def _started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and all that it started. It gets some time to leave the devices, which a kill might leave locked."""
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_END)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _why(code: int, said: deque[str]) -> str | None:
    """Return why a run that ended with this exit code failed; None if it did not."""
    if code == 0:
        return None
    reasons = [line.split("error: ", 1)[1] for line in said if ": error: " in line]
    ending = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return reasons[-1] if reasons else f"{ending}; python -m gpt2xla.doctor may know why"


def _commit() -> str:
    """Return the commit of the checkout that this file is in, and whether files were changed since."""
    try:
        commit, changed = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "no git checkout"
    return commit + (", with changes" if changed else "")
