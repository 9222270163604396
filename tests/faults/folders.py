"""Two trainers on one folder of checkpoints."""

from __future__ import annotations

import signal
import socket
import time
from functools import partial

from tests.faults import comparing, runs
from tests.faults.cases import Row, Setting, check_all, clear
from tests.faults.kills import wait_for_training


def shared_folder(setting: Setting) -> list[Row]:
    bar = (
        "the second leaves with 2 and one line that names host and process of the first, which continues; after SIGKILL of "
        "the first, the second takes over and ends as if unbroken"
    )
    cases = [(n, n % 2 + 1) for n in range(setting.cases(20, 2))]
    return [check_all(Row("two trainers on one --checkpoints-dir", bar), cases, partial(_second_is_refused, setting))]


def _second_is_refused(setting: Setting, case: tuple[int, int]) -> None:
    number, world = case
    folder, flags = setting.folder / f"shared-{number}", [*setting.data, *runs.SMALL_RUN]
    draw = runs.random_of(setting.seed, "shared", number)
    with runs.started([*flags, "--train-steps", 100000], folder, world) as first:
        wait_for_training(folder, first, 2)
        time.sleep(draw.uniform(0, 0.5))
        with runs.started([*flags, "--train-steps", 100000], folder, world) as second:
            codes = second.wait(60)
            assert codes[0] == 2, f"exit codes {codes}: {second.text[-600:]}"
            assert all(codes), f"exit codes {codes}"
            # A launcher would end the other process before it says the same.
            errors = [line for line in second.processes[0].text.splitlines() if "error:" in line]
            assert len(errors) == 1, second.text[-800:]
            assert f"process {first.processes[0].pid} on {socket.gethostname()}" in errors[0], errors[0]
            assert "Traceback" not in second.text, second.text[-800:]
        assert [process.poll() for process in first.processes] == [None] * world, "the first was disturbed"
        for process in first.processes:
            process.send(signal.SIGKILL)
        first.wait()
    # What it did beyond the run's last step does not count.
    clear(folder)
    with runs.started(flags, folder, world) as first:
        wait_for_training(folder, first, 2)
        first.processes[0].send(signal.SIGKILL)
        first.processes[-1].send(signal.SIGKILL)
        first.wait()
        runs.finish(flags, folder, world)
    comparing.check_same(folder, setting.unbroken[world], world)
    clear(folder)
