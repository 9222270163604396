"""A wsd run that is killed, and decays from its checkpoints that are killed: --resume PATH --decay-now N."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpt2xla.checkpoint import run_folder
from tests.faults import comparing, runs
from tests.faults.cases import Row, Setting, check_all, clear

_WSD = ["--decay-method", "wsd", "--decay-steps", 12, "--saved-checkpoint-limit", 0]
_DECAYS = ((18, 20), (42, 11))  # from which step on, and in how many


def decayed(setting: Setting) -> list[Row]:
    """SIGKILL of a wsd run, and of decays from two of its checkpoints, two or more times each."""
    bar = "each decay ends as if the run had been planned with it and unbroken, and so does the wsd run itself, bit for bit"
    row = Row("SIGKILL at random moments of a wsd run, and of decays from two of its checkpoints", bar)
    return [check_all(row, range(setting.cases(5, 1)), partial(_killed, setting))]


def _killed(setting: Setting, number: int) -> int:
    draw = runs.random_of(setting.seed, "decay", number)
    flags, folder = [*setting.data, *runs.SMALL_RUN, *_WSD], setting.folder / f"wsd-{number}"
    kills = _until_done(setting, draw, folder, lambda: flags, 4)
    planned = setting.folder / f"planned-{number}"
    runs.finish(flags, planned)
    comparing.check_same(folder, planned)
    for step, steps in _DECAYS:
        source, decay = run_folder.step_folder(folder, step), setting.folder / f"decay-{number}-{step}"
        named = [*setting.data, "--resume", source, "--decay-now", steps]
        kills += _until_done(setting, draw, decay, partial(_named_or_not, setting, draw, decay, named), 2)
        longer = [*flags, "--decay-steps", steps, "--train-steps", step + steps]
        runs.finish(longer, expected := setting.folder / f"planned-{number}-{step}")
        comparing.check_same(decay, expected, steps=step + steps, after=step)
        clear(decay)
        clear(expected)
    runs.finish(flags, folder)  # whose folder the decays left alone
    comparing.check_same(folder, planned)
    clear(folder)
    clear(planned)
    return kills


def _named_or_not(setting: Setting, draw: random.Random, decay: Path, named: list[Any]) -> list[Any]:
    """Return the same flags, or once there is a checkpoint, those that name the folder only."""
    return setting.data if run_folder.list_checkpoints(decay) and draw.random() < 0.5 else named


def _until_done(setting: Setting, draw: random.Random, folder: Path, flags: Callable[[], list[Any]], kills: int) -> int:
    """Start the run again until it is done. It is killed up to `kills` times. Return how often it was."""
    done = 0
    while done < kills:
        with runs.started(flags(), folder) as run:
            runs.sleep_until(time.monotonic() + draw.uniform(0, setting.seconds[1]))
            run.processes[0].send(signal.SIGKILL)
            (code,) = run.wait()
            assert code in (0, -signal.SIGKILL), f"exit code {code}: {run.text[-600:]}"
        if code == 0:
            break
        done += 1
    runs.finish(flags(), folder)
    return done
