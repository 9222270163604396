"""--keep-best and early stopping: SIGKILL around best.json, and stop requests at the moment when a run ends by itself."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpt2xla.checkpoint import best as best_file
from gpt2xla.checkpoint import folder as checkpoint
from gpt2xla.checkpoint import run_folder, seal
from gpt2xla.evals.row_losses import RowLosses
from gpt2xla.evals.schedule import Evaluations
from tests.faults import comparing, kills, runs, stops
from tests.faults.cases import Row, Setting, check_all, clear

# A rate at which the validation loss rises now and then. Validations and saves seldom meet.
_FLAGS = ["--learning-rate", "0.06", "--min-lr", "0.06", "--valid-interval", "4", "--valid-steps", "2", "--keep-best"]
_PATIENCE = ["--early-stopping-patience", "3", "--early-stopping-min-delta", "0.12"]


def _is_best_file(path: Any, *_: Any) -> bool:
    return Path(path).name.startswith(".best.json")


def _is_best_link(path: Any, *_: Any) -> bool:
    return Path(path).name.startswith(".best.") and not _is_best_file(path)


# Each is called with a number from 0, which counts new bests.
POINTS: dict[str, Callable[[int], None]] = {
    "before best.json is written": lambda n: kills._at(best_file, "write_whole", n),
    "before best.json's rename": lambda n: kills._at(os, "replace", n, only=_is_best_file),
    "after best.json's rename": lambda n: kills._at(os, "replace", n, before=False, only=_is_best_file),
    "before the link": lambda n: kills._at(best_file, "point", n),
    "before the link's rename": lambda n: kills._at(os, "replace", n, only=_is_best_link),
    "after the link's rename": lambda n: kills._at(os, "replace", n, before=False, only=_is_best_link),
    "before pruning": lambda n: kills._at(run_folder, "prune", n),
    "after an old one is renamed": lambda n: kills._at(Path, "rename", n, before=False),
    "before the checkpoint's rename": lambda n: kills._at(os, "rename", n, only=kills._is_step),
    "after the checkpoint's rename": lambda n: kills._at(os, "rename", n, before=False, only=kills._is_step),
}


def best(setting: Setting) -> list[Row]:
    flags = [*setting.data, *runs.SMALL_RUN, *_FLAGS]
    unbroken, early = ({world: setting.folder / f"{name}-{world}" for world in (1, 2)} for name in ("all", "early"))
    for world in (1, 2):
        runs.finish(flags, unbroken[world], world)
        runs.finish([*flags, *_PATIENCE], early[world], world)
    ended = {world: max(comparing.losses(early[world])) for world in (1, 2)}
    assert all(12 < step < runs.STEPS for step in ended.values()), f"the runs with a patience ended after {ended}"
    kill = Row(
        "SIGKILL before and after each write and rename around best.json",
        "best.json names a whole checkpoint with its loss at once; started again, it ends as if unbroken, best.json too",
    )
    points, places = list(POINTS), list(_PLACES)
    cases = [
        (points[n % len(points)], n // len(points) % 3, 2 if n % 5 == 4 else 1)
        for n in range(0, setting.cases(40, len(points)), 1 if setting.full else 2)
    ]
    check_all(kill, cases, partial(_killed, setting, flags, unbroken))
    stop = Row(
        "SIGTERM or SIGINT in or after the validations by which a run ends early",
        "exit code 143 or 130 (0 where the run has ended by itself), all processes after the same step; the same command "
        "ends as if unbroken, then has nothing to do",
    )
    cases = [(places[n % len(places)], n // len(places), (n + n // 4) % 2 + 1) for n in range(setting.cases(24, 4))]
    check_all(stop, cases, partial(_stopped, setting, [*flags, *_PATIENCE], early, ended))
    return [kill, stop]


def _killed(setting: Setting, flags: list[str], unbroken: dict[int, Path], case: tuple[str, int, int]) -> None:
    point, number, world = case
    folder = setting.folder / "-".join(map(str, case)).replace(" ", "_").replace("'", "")
    kills._expect_kill(flags, folder, world, partial(kills._on_main, partial(POINTS[point], number)))
    if (folder / "best.json").exists():
        check_best(folder)
    runs.finish(flags, folder, world)
    _check_same(folder, unbroken[world], world, runs.STEPS)
    clear(folder)


def check_best(folder: Path) -> None:
    """Raise AssertionError unless best.json names a whole checkpoint, and the loss that was logged for it."""
    named = json.loads((folder / "best.json").read_text())
    kept = run_folder.step_folder(folder, named["step"])
    assert seal.find_damage(kept) is None, f"best.json names {kept.name}, which is not whole"
    logged = [line["valid_loss"] for line in comparing.metrics(folder) if line.get("valid_loss") is not None
              and line["step"] == named["step"]]  # fmt: skip
    assert named["valid_loss"] in logged, f"best.json has {named}, the log {logged}"


def _check_same(folder: Path, unbroken: Path, world: int, steps: int) -> None:
    comparing.check_same(folder, unbroken, world, steps=steps)
    check_best(folder)
    named, should = ((path / "best.json").read_text() for path in (folder, unbroken))
    assert named == should, f"best.json is {named}, unbroken {should}"
    assert os.readlink(folder / "best") == os.readlink(unbroken / "best"), "the link to the best is another"
    there, expected = ({f.name for f in run_folder.list_checkpoints(path)} for path in (folder, unbroken))
    assert json.loads(named)["step"] in {int(name[5:]) for name in there}
    assert max(there) == max(expected), f"{max(there)} is the last one, unbroken {max(expected)}"


def _at_last_validation(ended: int, number: int, inject: Callable[[], None]) -> None:
    """Call `inject` when the validation begins by which the run ends, or for a higher `number` one before it."""
    original, step_of_it = Evaluations.run, ended - 4 * (number % 3)

    def run(self: Any, step: int, log: Any) -> bool:
        if step == step_of_it:
            inject()
        return original(self, step, log)

    Evaluations.run = run  # type: ignore[method-assign]


def _send(number: int) -> None:
    os.kill(os.getpid(), stops._number(number))


def _when_over(ended: int, number: int) -> None:
    """Send the signal when that validation is over, and the run has decided to end."""
    original, step_of_it = Evaluations.run, ended - 4 * (number % 3)

    def run(self: Any, step: int, log: Any) -> bool:
        is_evaluated = original(self, step, log)
        if step == step_of_it:
            _send(number)
        return is_evaluated

    Evaluations.run = run  # type: ignore[method-assign]


_PLACES: dict[str, Callable[[int, int], None]] = {
    "as the validation begins": lambda ended, n: _at_last_validation(ended, n, partial(_send, n)),
    "inside the validation": lambda ended, n: _at_last_validation(
        ended, n, lambda: stops._signal_in(RowLosses, "_score", 2, stops._number(n))
    ),
    "as the validation is over": _when_over,
    "as its checkpoint is written": lambda ended, n: _at_last_validation(
        ended, n, lambda: stops._signal_in(checkpoint, "_write", 1, stops._number(n))
    ),
}


def _stopped(
    setting: Setting, flags: list[str], early: dict[int, Path], ended: dict[int, int], case: tuple[str, int, int]
) -> None:
    place, number, world = case
    folder = setting.folder / "-".join(map(str, case)).replace(" ", "_")

    def prepare(rank: int) -> None:
        if rank == number % world:
            _PLACES[place](ended[world], number)

    with runs.started(flags, folder, world, prepare) as run:
        run.wait(60)
        assert "stopp" in run.text, run.text[-600:]
        has_ended = "stopped: the" in run.text
        stops._check_stopped(run, folder, world, time.monotonic(), None if has_ended else stops._number(number))
    for start in range(3):  # a stop request may come in one of the validations before
        if "nothing to do" in (text := runs.finish(flags, folder, world)):
            assert has_ended == (start == 0), run.text[-600:]
            break
    assert "the run has ended early" in text, text[-600:]
    _check_same(folder, early[world], world, ended[world])
    clear(folder)
