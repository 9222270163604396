"""SIGKILL: of a whole run, of one of its processes, and in the middle of a save."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt2xla.checkpoint import folder as checkpoint
from gpt2xla.checkpoint import run_folder, seal
from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.logs import sinks as metrics
from gpt2xla.training import pretrain
from tests.faults import comparing, runs
from tests.faults.cases import Row, Setting, check_all, clear

_EXACT = "started again, it ends as if unbroken: losses, windows, validation, weights, optimizer, bit for bit"


def whole_runs(setting: Setting) -> list[Row]:
    """SIGKILL of all processes at random moments, up to four times in one run."""
    rows = []
    for world, full, smoke in ((1, 150, 3), (2, 50, 2)):
        what = "one process" if world == 1 else "two processes, gloo"
        row = Row(f"SIGKILL at random moments, {what}", _EXACT)
        kills, chains = setting.cases(full, smoke), []
        while kills:
            chains.append((world, len(chains), min(4, kills)))
            kills -= chains[-1][2]
        rows.append(check_all(row, chains, partial(_killed_again_and_again, setting)))
    return rows


def _killed_again_and_again(setting: Setting, case: tuple[int, int, int]) -> int:
    world, number, kills = case
    draw = runs.random_of(setting.seed, "kill", *case)
    folder, flags = setting.folder / f"kill-{world}-{number}", [*setting.data, *runs.SMALL_RUN]
    done, tries = 0, 0
    while done < kills:
        with runs.started(flags, folder, world) as run:
            runs.sleep_until(time.monotonic() + draw.uniform(0, setting.seconds[world]))
            victims = [process for process in run.processes if process.poll() is None]
            for process in victims:
                process.send(signal.SIGKILL)
            codes = run.wait()
            done += -signal.SIGKILL in codes
            assert set(codes) <= {0, -signal.SIGKILL}, f"exit codes {codes}: {run.text[-600:]}"
        if -signal.SIGKILL not in codes:  # it was done before
            comparing.check_same(folder, setting.unbroken[world], world)
            clear(folder)
            tries += 1
            assert tries < 50, "no moment was early enough"
    runs.finish(flags, folder, world)
    comparing.check_same(folder, setting.unbroken[world], world)
    clear(folder)
    return kills


# Points of a save ---------------------------------------------------------------------------------------------------


def _die(*_: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _at(owner: Any, name: str, call: int, before: bool = True, only: Callable[..., bool] | None = None) -> None:
    """Die in call number `call`, from 0, of `owner.name`: before it, or when it is done."""
    original, seen = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        counts = only is None or only(*args)
        is_due = counts and seen[0] == call
        seen[0] += counts
        if is_due and before:
            _die()
        result = original(*args, **kwargs)
        return _die() if is_due else result

    setattr(owner, name, wrapped)


def _in_middle_of_file(owner: Any, name: str, path_of: Callable[..., Path], call: int) -> None:
    """Die when call number `call` of `owner.name` has written half of its file."""
    original, seen = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if seen[0] == call:
            file = path_of(*args)
            os.truncate(file, file.stat().st_size // 2)
            _die()
        seen[0] += 1
        return result

    setattr(owner, name, wrapped)


def _path_of(file: Any) -> Path:
    """Return the path of an open file, after its contents are written out."""
    file.flush()
    return Path(file.name)


def _in_middle_of_deleting(call: int) -> None:
    seen = [0]
    original = shutil.rmtree

    def wrapped(path: Any, *args: Any, **kwargs: Any) -> None:
        path = Path(path)
        if path.exists():
            if seen[0] == call:
                sorted(path.iterdir())[0].unlink()
                _die()
            seen[0] += 1
        original(path, *args, **kwargs)

    shutil.rmtree = wrapped  # type: ignore[assignment]


def _in_middle_of_a_line(call: int) -> None:
    original, seen = metrics.JsonlSink.write, [0]

    def wrapped(self: Any, line: dict[str, Any]) -> None:
        if seen[0] == call:
            os.write(self._stream.fileno(), b'{"step": 1')
            _die()
        seen[0] += 1
        original(self, line)

    metrics.JsonlSink.write = wrapped  # type: ignore[method-assign]


def _is_step(path: Any, *_: Any) -> bool:
    return Path(path).name.startswith((".step-", "step-"))


# Each is called with the number of the save, from 0.
POINTS: dict[str, Callable[[int], None]] = {
    "before the save": lambda n: _at(checkpoint, "save", n),
    "before the model's file": lambda n: _at(hf, "save_file", n),
    "in the middle of the model's file": lambda n: _in_middle_of_file(hf, "save_file", lambda _, file: file, n),
    "in the middle of the training state": lambda n: _in_middle_of_file(
        torch, "save", lambda _, file: _path_of(file), n
    ),
    "before COMPLETE": lambda n: _at(seal, "file_sha256", 4 * n + 3),
    "between the syncs": lambda n: _at(os, "fsync", 7 * n + 3),
    "before the rename": lambda n: _at(os, "rename", n, only=_is_step),
    "after the rename": lambda n: _at(os, "rename", n, before=False, only=_is_step),
    "before the link to the newest": lambda n: _at(run_folder, "point", n),
    "in the middle of the link": lambda n: _at(os, "replace", n, only=lambda path, _: "latest" in Path(path).name),
    "before pruning": lambda n: _at(run_folder, "prune", n),
    "before an old one is renamed": lambda n: _at(Path, "rename", max(0, n - 2)),
    "after an old one is renamed": lambda n: _at(Path, "rename", max(0, n - 2), before=False),
    "while an old one is deleted": lambda n: _in_middle_of_deleting(max(0, n - 2)),
    "in the middle of a line of metrics": lambda n: _in_middle_of_a_line(6 * n + 5),
}
# Points of the resuming start, at which the same command is killed once more.
RESUME_POINTS: dict[str, Callable[[], None]] = {
    "before what was interrupted is cleared": lambda: _at(pretrain, "prepare_folder", 0),
    "after it is cleared": lambda: _at(pretrain, "prepare_folder", 0, before=False),
    "before the metrics are cut": lambda: _at(os, "replace", 2),
    "after the metrics are cut": lambda: _at(os, "replace", 2, before=False),
}


def points_of_a_save(setting: Setting) -> list[Row]:
    """SIGKILL at named points of a save; half of the runs are killed at a point of the next start, too."""
    row = Row("SIGKILL at named points of a save", _EXACT)
    names, resume_names = list(POINTS), list(RESUME_POINTS)
    cases = []
    for number in range(setting.cases(100, len(names))):
        save = number // len(names) % 7 + 2 if setting.full else 4  # not the last, after which nothing is left to do
        again = resume_names[number // 2 % len(resume_names)] if number % 2 else None
        cases.append((names[number % len(names)], save, again, 2 if number % 8 == 7 else 1))
    return [check_all(row, cases, partial(_killed_at_a_point, setting))]


def _killed_at_a_point(setting: Setting, case: tuple[str, int, str | None, int]) -> None:
    point, save, again, world = case
    folder = setting.folder / "-".join(map(str, case)).replace(" ", "_").replace("'", "")
    flags = [*setting.data, *runs.SMALL_RUN]
    _expect_kill(flags, folder, world, partial(_on_main, partial(POINTS[point], save)))
    if again:
        _expect_kill(flags, folder, world, partial(_on_main, RESUME_POINTS[again]))
    runs.finish(flags, folder, world)
    comparing.check_same(folder, setting.unbroken[world], world)
    clear(folder)


def _on_main(inject: Callable[[], None], rank: int) -> None:
    if rank == 0:
        inject()


def _expect_kill(flags: list[str], folder: Path, world: int, prepare: runs.Prepare) -> None:
    with runs.started(flags, folder, world, prepare) as run:
        code = run.processes[0].wait()
        assert code == -signal.SIGKILL, f"the point was not reached, exit code {code}: {run.text[-300:]}"


# One process of several ----------------------------------------------------------------------------------------------


def one_of_two(setting: Setting) -> list[Row]:
    """SIGKILL of one process: the other must exit, and say for whom it waited."""
    bar = "the other leaves within 30 s with a code above 0; the message names the rank; no process is left"
    flags = [*setting.data, *runs.SMALL_RUN]
    row = Row("one of two processes killed, gloo", bar)
    check_all(row, [(n, n % 2) for n in range(setting.cases(44, 2))], partial(_one_killed, setting, flags))
    return [row]


def _one_killed(setting: Setting, flags: list[str], case: tuple[int, int]) -> None:
    number, victim = case
    folder = setting.folder / f"one-{number}-{victim}"
    draw = runs.random_of(setting.seed, "one", *case)
    with runs.started([*flags, "--train-steps", 100000, "--save-interval", 50], folder, world=2) as run:
        wait_for_training(folder, run)
        time.sleep(draw.uniform(0, 1))
        run.processes[victim].send(signal.SIGKILL)
        killed = time.monotonic()
        code = run.processes[1 - victim].wait(60)
        seconds = time.monotonic() - killed
        text = run.processes[1 - victim].text
        run.processes[victim].wait()
        assert code is not None, "the other does not leave within 60 s"
        assert code > 0, f"the other left with {code}: {text[-400:]}"
        assert seconds < 30, f"the other left after {seconds:.0f} s"
        assert not run.orphans(), "a process is left"
        check_names_rank(text, victim)
    clear(folder)


def check_names_rank(text: str, victim: int) -> None:
    errors = [line for line in text.splitlines() if "error:" in line]
    names = (f"rank {victim}", f"process {victim}", f"replica {victim}")
    assert any(name in line for line in errors for name in names), f"rank {victim} is not named: {text[-500:]}"
    assert "Traceback" not in text, f"a traceback: {text[-500:]}"


def wait_for_training(folder: Path, run: runs.Run, step: int = 2, seconds: float = 120) -> None:
    """Wait until the metrics have `step`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        file = folder / "metrics.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= step:
            return
        assert run.processes[0].poll() is None, f"it exited early: {run.text[-600:]}"
        time.sleep(0.02)
    raise AssertionError(f"no training within {seconds} s: {run.text[-600:]}")
