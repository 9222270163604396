"""Runs of the trainer as processes that faults can be done to.

Imports take seconds and these runs less than one: the harness imports everything once, and each run is a fork of it that
then goes through `run_pretrain.main` like the program itself. The forks are sessions of their own, so that what a run
leaves behind can be found.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch._dynamo  # noqa: F401  otherwise imported late, again in each fork

import gpt2xla.runtime.torch.runtime
import gpt2xla.training.pretrain
import run_pretrain
from gpt2xla.processes.exits import exit_code, exit_now_on_signal
from tests.faults import recording

ROOT = Path(__file__).resolve().parents[2]
STEPS, VALID_EVERY, SAVE_EVERY = 60, 9, 6
SMALL_RUN = [
    "--vocab-size", "64", "--seq-length", "16", "--d-model", "32", "--num-layers", "2", "--num-heads", "2",
    "--train-batch-size", "8", "--gradient-accum-step", "1", "--eval-batch-size", "8", "--valid-steps", "6",
    "--learning-rate", "0.01", "--min-lr", "0.001", "--warmup-steps", "4", "--decay-steps", str(STEPS),
    "--train-steps", str(STEPS), "--valid-interval", str(VALID_EVERY), "--save-interval", str(SAVE_EVERY),
    "--saved-checkpoint-limit", "2", "--shuffle",
]  # fmt: skip
Prepare = Callable[[int], None]
_PATIENCE = 120.0  # seconds after which a process that should have ended counts as hanging


def write_data(folder: Path) -> list[str]:
    """Write a small data set of tokens that mostly follow from one another. Return the flags that name it."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 6000), ("test", 900)):
        (folder / name).mkdir(parents=True)
        tokens = np.cumsum(np.where(rng.random(count) < 0.8, 1, rng.integers(0, 64, count))) % 64
        np.save(folder / name / "000.npy", tokens.astype(np.uint16))
    return ["--train-dir", str(folder / "train"), "--valid-dir", str(folder / "test")]


class Process:
    """A started process and its output."""

    def __init__(self, pid: int, output: Path) -> None:
        self.pid, self.output = pid, output
        self.code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for the signal that ended the process; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = _PATIENCE) -> int | None:
        """Wait and return the exit code, or None if the process still runs."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.code

    def send(self, number: signal.Signals) -> bool:
        """Return whether the process was still running."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")


class Run:
    """The processes of one start of a run."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self.processes = list(processes)

    def wait(self, seconds: float = _PATIENCE) -> list[int | None]:
        """Wait and return the exit codes: None for a process that hangs, after printing where its threads are."""
        deadline = time.monotonic() + seconds
        codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in self.processes]
        hanging = [process for process in self.processes if process.code is None]
        for process in hanging:
            process.send(signal.SIGABRT)  # faulthandler then prints, whatever the threads wait for
        for process in hanging:
            process.wait(5)
            print(f"    HANGS: {process.output}: {process.text[-3000:]}", flush=True)
        return codes

    def kill(self) -> None:
        """End all of them, and the processes that they started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def text(self) -> str:
        return "".join(process.text for process in self.processes)

    def orphans(self) -> list[int]:
        """Return the processes of their sessions that still run."""
        sessions, found = {process.pid for process in self.processes}, []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (entry / "stat").read_text().rsplit(")")[-1].split()
                if entry.name.isdigit() and fields[0] != "Z" and int(fields[3]) in sessions:
                    found.append(int(entry.name))
        return found


@contextlib.contextmanager
def started(
    flags: Sequence[object], folder: Path, world: int = 1, prepare: Prepare | None = None, url: str = ""
) -> Iterator[Run]:
    """Run `run_pretrain.py` in forks of this process: one, or `world` of them joined by gloo. Each calls `prepare(rank)`
    before it begins, and records what it reads and updates beside `folder`, the run's checkpoints, unless these are at a
    `url`."""
    argv = [*map(str, flags), "--checkpoints-dir", url or str(folder)]
    shared: dict[str, str] = {}
    if world > 1:
        shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(world):
        environment = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
        output = next_file(folder.with_name(f"{folder.name}.output-{rank}"))
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _become_run(argv, environment, output, folder, rank, prepare)
        processes.append(Process(pid, output))
    run = Run(processes)
    try:
        yield run
    finally:
        run.kill()


def _become_run(
    argv: list[str], environment: dict[str, str], output: Path, folder: Path, rank: int, prepare: Prepare | None
) -> None:
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faulthandler.enable(2)
        os.environ.update(environment)
        sys.argv = ["run_pretrain.py", *argv]
        gpt2xla.runtime.torch.accelerators.measured_cpu_flops = lambda dtype: (
            None
        )  # a fifth of a second that changes nothing
        recording.record(folder.with_name(f"{folder.name}.steps-{rank}"))
        if prepare:
            prepare(rank)
        code = exit_now_on_signal(exit_code(run_pretrain.main))
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        # What an interpreter does at its end: join threads, call what was registered.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def program(command: Sequence[object], folder: Path, **environment: str) -> Iterator[Run]:
    """Run a command from the repository's root as a fresh process: torchrun, or the XLA runner."""
    output = next_file(folder.with_name(f"{folder.name}.output"))
    inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    inherited["PYTHONFAULTHANDLER"] = "1"  # as `Run.wait` expects
    with output.open("w") as stream:
        popen = subprocess.Popen(
            [sys.executable, *map(str, command), "--checkpoints-dir", str(folder)], cwd=ROOT, stdout=stream,
            stderr=subprocess.STDOUT, start_new_session=True, env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
        )  # fmt: skip
    run = Run([Process(popen.pid, output)])
    try:
        yield run
    finally:
        run.kill()
        popen.returncode = run.processes[0].code


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run_pretrain.py"]


def torchrun(flags: Sequence[object], folder: Path) -> contextlib.AbstractContextManager[Run]:
    return program([*TORCHRUN, *flags], folder, GLOO_SOCKET_IFNAME="lo")


def xla(
    flags: Sequence[object], folder: Path, replicas: int = 1, program_file: str = "run_pretrain_xla.py"
) -> contextlib.AbstractContextManager[Run]:
    return program(
        [program_file, *flags], folder, PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(replicas), REPLICAS=str(replicas)
    )


def finish(flags: Sequence[object], folder: Path, world: int = 1, prepare: Prepare | None = None) -> str:
    """Run to the end and return the output. Raises AssertionError unless all processes exit with 0."""
    with started(flags, folder, world, prepare) as run:
        codes = run.wait()
        assert codes == [0] * world, f"exit codes {codes}: {run.text[-600:]}"
        return run.text


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def next_file(path: Path) -> Path:
    """Return the first of `path.0`, `path.1`, ... that does not exist."""
    number = 0
    while (file := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return file


def sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def random_of(*key: object) -> random.Random:
    return random.Random("/".join(map(str, key)))
