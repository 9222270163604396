"""The first signal requests a stop and is answered at once, also inside a long call of C; later ones end the process."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
from conftest import ROOT

from gpt2xla.errors import RunFailed
from gpt2xla.processes import signals

# The main thread works in C for seconds, where Python's own handlers would have to wait.
PROGRAM = """
import hashlib, multiprocessing, sys, time
from gpt2xla.processes import signals
signals._SECONDS_OF_ONE_REQUEST = 0.3
def work():
    while True:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000_000)
def train(stop, is_saving=False):
    stop.handle("this step", lambda: "newest checkpoint: step 7 (run/step-00000007)")
    if is_saving:
        stop.begin_save()
    print("working", flush=True)
    work()
if __name__ == "__main__":
    with signals.StopSignals() as stop:
        if sys.argv[1] == "worker":
            process = multiprocessing.get_context("spawn").Process(target=train, args=(stop,))
            process.start()
            process.join()
            raise SystemExit(process.exitcode)
        if sys.argv[1] == "compiling":
            with signals.compiling(before_training=True):
                train(stop)
        train(stop, sys.argv[1] == "saving")
"""
STOPS = "{0}stopping with a checkpoint after this step; {1} to stop without one\n"
SAVES = "{0}a checkpoint is being written, then the run ends; {1} to end at once\n"
ENDS = "{0}ended at once; newest checkpoint: step 7 (run/step-00000007)\n"


@pytest.mark.parametrize(
    ("mode", "number", "again", "answers"),
    [
        ("training", signal.SIGINT, "press again", [STOPS, ENDS]),
        ("saving", signal.SIGTERM, "send it again", [STOPS, SAVES, ENDS]),
        ("worker", signal.SIGTERM, "send it again", [STOPS, ENDS]),
        ("compiling", signal.SIGTERM, "send it again", [ENDS]),
    ],
)
def test_each_signal_is_answered_at_once(
    mode: str, number: signal.Signals, again: str, answers: list[str], tmp_path: object
) -> None:
    file = os.path.join(str(tmp_path), "program.py")
    with open(file, "w") as stream:
        stream.write(PROGRAM)
    with subprocess.Popen(
        [sys.executable, file, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "working\n"
        for answer in answers:
            time.sleep(0.4)
            process.send_signal(number)
            if mode != "worker":
                process.send_signal(number)  # as torchrun passes it on: the same request
            sent = time.monotonic()
            assert process.stderr.readline() == answer.format("" if number == signal.SIGINT else "SIGTERM: ", again)
            assert time.monotonic() - sent < 1
        assert process.wait(5) == 128 + number
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (RunFailed("step 7 was not saved"), RunFailed("step 7 was not saved")),  # of a worker that has saved in vain
        (SystemExit(1), SystemExit(1)),
        (BrokenProcessPool(), SystemExit(143)),  # the signal has ended a worker
    ],
)
def test_how_workers_end_after_a_signal_is_how_their_launcher_ends(error: BaseException, shown: BaseException) -> None:
    def launch() -> None:
        with signals.StopSignals() as stop:
            stop.received = "SIGTERM"
            raise error

    with pytest.raises(type(shown)) as ending:
        launch()
    assert str(ending.value) == str(shown)


COMPILES = """
import subprocess, time
from gpt2xla.processes import signals
with signals.StopSignals() as stop:
    stop.handle("this step", str)
    with signals.compiling(before_training=False):
        child = subprocess.Popen(["sleep", "0.5"])
    print("compiling", flush=True)
    print(child.wait(), stop.received)
"""


def test_what_a_compile_starts_survives_a_signal_to_all_processes() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", COMPILES], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdout.readline() == "compiling\n"
        os.killpg(process.pid, signal.SIGTERM)
        assert process.communicate(timeout=10)[0] == "0 SIGTERM\n"
