"""Stopping on purpose: SIGTERM, Ctrl-C, --max-hours."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from gpt2xla.checkpoint import folder as checkpoint
from gpt2xla.checkpoint import run_folder, seal
from gpt2xla.evals.row_losses import RowLosses
from gpt2xla.training.train_step import TrainStep
from tests.faults import comparing, runs
from tests.faults.cases import Row, Setting, check_all, clear
from tests.faults.kills import wait_for_training

_LIMIT_BAR = (
    "exit code 0 and a checkpoint of where it stopped, within a step, a save and 5 s; the same command continues, and ends "
    "as if unbroken, bit for bit"
)
_BAR = _LIMIT_BAR.replace("exit code 0", "exit code 143 or 130 (0 if it was finished)")
_SECONDS = 5 + 5  # a step and a save take less than the second 5 on a machine that is shared


def signalled(setting: Setting) -> list[Row]:
    """Send SIGTERM or SIGINT at random moments, inside validation, and inside a save."""
    rows = []
    for world, full, smoke in ((1, 45, 2), (2, 25, 1)):
        what = "one process" if world == 1 else "two processes"
        row = Row(f"SIGTERM or SIGINT at random moments of training, {what}", _BAR)
        cases = [(world, n) for n in range(setting.cases(full, smoke))]
        rows.append(check_all(row, cases, partial(_at_random, setting)))
    row = Row("SIGTERM or SIGINT inside validation, a save, an update", _BAR)
    cases = [(n, list(_PLACES)[n % len(_PLACES)], n // len(_PLACES) % 2 + 1) for n in range(setting.cases(30, 4))]
    rows.append(check_all(row, cases, partial(_at_place, setting)))
    row = Row(
        "a second signal, more than a second later; a third one while the last checkpoint is written",
        "the process is gone within 5 s, with a code above 0; the second one lets a checkpoint be written",
    )
    rows.append(check_all(row, range(setting.cases(10, 1)), partial(_twice, setting)))
    row = Row("--max-hours", _LIMIT_BAR)
    cases = [(n, n % 2 + 1) for n in range(setting.cases(10, 2))]
    rows.append(check_all(row, cases, partial(_out_of_time, setting)))
    return rows


def _number(case: int) -> signal.Signals:
    return signal.SIGINT if case % 2 else signal.SIGTERM


def _at_random(setting: Setting, case: tuple[int, int]) -> None:
    """Send the signal to only one of two processes. The other must learn of it."""
    world, number = case
    draw = runs.random_of(setting.seed, "signal", *case)
    folder, flags = setting.folder / f"signal-{world}-{number}", [*setting.data, *runs.SMALL_RUN]
    while True:
        with runs.started(flags, folder, world) as run:
            wait_for_training(folder, run, 1)
            time.sleep(draw.uniform(0, 0.8 * setting.seconds[world]))
            if not folder.joinpath(
                f"step-{runs.STEPS:08d}"
            ).exists():  # otherwise training is over and the signal has no effect
                run.processes[draw.randrange(world)].send(_number(number))
                _check_stopped(run, folder, world, time.monotonic(), _number(number))
                break
        clear(folder)
    _check_goes_on(setting, flags, folder, world)


def _check_stopped(
    run: runs.Run, folder: Any, world: int, begun: float, number: signal.Signals | None, last_step: int = runs.STEPS
) -> None:
    """Check how a run ended to which the signal `number` was sent (None: none), which alone would end after `last_step`."""
    codes = run.wait(60)
    newest = run_folder.list_checkpoints(folder)[-1]
    is_finished = any(line["step"] == last_step and "valid_loss" in line for line in comparing.metrics(folder))
    code = 128 + number if number and not is_finished else 0
    assert codes == [code] * world, f"exit codes {codes} instead of {code}: {run.text[-600:]}"
    assert time.monotonic() - begun < _SECONDS, f"it took {time.monotonic() - begun:.1f} s"
    assert not run.orphans(), "a process is left"
    assert seal.find_damage(newest) is None
    logged = max(comparing.losses(folder))
    assert seal.step_of(newest) == logged, f"{newest.name}, but step {logged} was taken"
    comparing.check_no_litter(folder)


def _check_goes_on(setting: Setting, flags: list[str], folder: Any, world: int) -> None:
    runs.finish(flags, folder, world)
    comparing.check_same(folder, setting.unbroken[world], world)
    assert not list(folder.glob("abandoned-*")), "a copy is left"
    clear(folder)


def _signal_in(owner: Any, name: str, call: int, number: signal.Signals) -> None:
    original, seen = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


_PLACES: dict[str, Callable[[int, signal.Signals], None]] = {
    "validation": lambda n, number: _signal_in(RowLosses, "_score", 6 * (n % 5) + n % 6 + 1, number),
    "save": lambda n, number: _signal_in(checkpoint, "_write", n % 7 + 1, number),
    "rename": lambda n, number: _signal_in(checkpoint, "_fsync", 9 * (n % 6) + n % 9 + 1, number),
    "update": lambda n, number: _signal_in(TrainStep, "__call__", 7 * n % 50 + 1, number),
}


def _at_place(setting: Setting, case: tuple[int, str, int]) -> None:
    number, place, world = case
    folder, flags = setting.folder / f"place-{number}", [*setting.data, *runs.SMALL_RUN]

    def prepare(rank: int) -> None:
        if rank == 0:
            _PLACES[place](number, _number(number // 4))

    with runs.started(flags, folder, world, prepare) as run:
        wait_for_training(folder, run, 1)
        run.wait(60)
        _check_stopped(run, folder, world, time.monotonic(), _number(number // 4))
        is_whole = run_folder.list_checkpoints(folder)[-1].name.endswith(str(runs.STEPS))
        assert "stopped by" in run.text or is_whole, run.text[-600:]
    _check_goes_on(setting, flags, folder, world)


def _twice(setting: Setting, number: int) -> None:
    """Send a second and a third signal while a save of 30 s delays the first stop request; or, to every other run, a second
    one in a step of 30 s."""
    folder, flags = setting.folder / f"twice-{number}", [*setting.data, *runs.SMALL_RUN]
    folder.mkdir()

    in_save = number % 2 == 0

    def slow(rank: int) -> None:
        owner, name = (checkpoint, "_write") if in_save else (TrainStep, "__call__")
        original, seen = getattr(owner, name), [0]

        def slowed(*args: Any) -> Any:
            seen[0] += 1
            if in_save or seen[0] == 8:
                # In C, where Python's own handler would have to wait.
                hashlib.pbkdf2_hmac("sha256", b"", b"", 50_000_000)
            return original(*args)

        setattr(owner, name, slowed)

    with runs.started(flags, folder, 1, slow) as run:
        wait_for_training(folder, run, 4 if in_save else 7)
        time.sleep(0.3)
        for again in (0, 1) if in_save else (0,):
            run.processes[0].send(_number(number + again))
            time.sleep(1.3)
            assert run.processes[0].poll() is None, "it did not wait"
        run.processes[0].send(_number(number // 2))
        code = run.processes[0].wait(5)
        assert code not in (0, None), f"exit code {code} after the last signal"
        assert "ended at once" in run.text, run.text[-600:]
        assert ("a checkpoint is being written" in run.text) == in_save, run.text[-600:]
    _check_goes_on(setting, flags, folder, 1)


def _out_of_time(setting: Setting, case: tuple[int, int]) -> None:
    number, world = case
    folder, flags = setting.folder / f"hours-{number}", [*setting.data, *runs.SMALL_RUN]
    seconds = setting.seconds[world] * (0.1 + 0.08 * number)
    with runs.started([*flags, "--max-hours", seconds / 3600], folder, world) as run:
        wait_for_training(folder, run, 1)
        run.wait(60)
        _check_stopped(run, folder, world, time.monotonic(), None)
    _check_goes_on(setting, flags, folder, world)
