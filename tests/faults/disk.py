"""Disks that are full, broken or slow, and clocks that jump."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from gpt2xla.checkpoint import folder as checkpoint
from gpt2xla.checkpoint import run_folder, seal
from tests.faults import comparing, runs, shim
from tests.faults.cases import Row, Setting, check_all, clear

_SHORT = ["--train-steps", "24", "--decay-steps", "24"]  # saves at 6, 12, 18, 24
_AT = 12  # the save in which calls fail
_ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
_WITHOUT = "not run: it needs a C compiler, gcc or cc"


def failing(setting: Setting) -> list[Row]:
    """Let each call that writes fail in one save: once, or permanently."""
    good = "older checkpoints are whole, nothing half-written is left"
    bars = {
        "ENOSPC or EIO for good, from each call of a save on, --on-save-error stop": f"exit code 1, one clear line; {good}",
        "ENOSPC or EIO once, at each call of a save, --on-save-error stop": (
            f"exit code 1 and a checkpoint of the last step; the same command continues and ends as if unbroken; {good}"
        ),
        "ENOSPC or EIO for good in one save, --on-save-error go-on": f"one clear line; it ends as if unbroken; {good}",
        "SIGKILL at each call of a save": "started again, it ends as if unbroken, bit for bit",
        "a full disk for all of --checkpoints-dir, metrics.jsonl too": f"exit code 1, no traceback; {good}",
    }
    rows = [Row(fault, bar) for fault, bar in bars.items()]
    if not shim.is_loaded():
        return [Row(row.fault, row.bar, notes=[_WITHOUT]) for row in rows]
    reference = setting.folder / "unbroken"
    flags = [*setting.data, *runs.SMALL_RUN, *_SHORT]
    runs.finish(flags, reference)
    calls = _count_calls(setting, flags)
    every = range(0, calls, 1 if setting.full else 11)
    both = [(name, call) for name in _ERRORS for call in every]
    for row in rows:
        row.notes.append(f"a save makes {calls} calls that write, sync, create or rename")
    check_all(rows[0], both, partial(_stops, setting, flags))
    check_all(rows[1], both, partial(_stops_once, setting, flags, reference))
    check_all(rows[2], both, partial(_goes_on, setting, flags, reference))
    check_all(rows[3], every, partial(_killed, setting, flags, reference))
    check_all(rows[4], range(6 if setting.full else 1), partial(_all_full, setting, flags))
    return rows


def _arm(part: str, call: int, mode: int, error: int, rank: int) -> None:
    """Arm the shim when the save at step `_AT` begins."""
    original = checkpoint._write

    def write(folder: Path, *args: Any) -> None:
        if folder.name == f".step-{_AT:08d}.partial":
            checkpoint._write = original
            shim.arm(part, call, mode, error)
        original(folder, *args)

    checkpoint._write = write


def _count_calls(setting: Setting, flags: list[str]) -> int:
    folder = setting.folder / "count"

    def prepare(rank: int) -> None:
        _arm(f"step-{_AT:08d}", -1, shim.ONCE, 0, rank)
        original = run_folder.prune

        def prune(root: Path, newest: Path, limit: int, in_use: Collection[Path]) -> list[str]:
            if newest.name == f"step-{_AT:08d}":
                root.with_name("calls").write_text(str(shim.seen()))
            return original(root, newest, limit, in_use)

        run_folder.prune = prune

    runs.finish(flags, folder, 1, prepare)
    calls = int((setting.folder / "calls").read_text())
    clear(folder)
    assert calls > 20, f"only {calls} calls were seen"
    return calls


def _start(flags: list[str], folder: Path, case: tuple[str, int], part: str, mode: int, code: int | None) -> list[str]:
    """Run with that call failing until the run ends with `code` (None: 1 if a save failed). Return what it reports about
    failed saves."""
    error, call = case
    with runs.started(flags, folder, 1, partial(_arm, part, call, mode, _ERRORS[error])) as run:
        codes = run.wait(60)
        lines = [line for line in run.text.splitlines() if "could not be saved" in line]
        assert codes == [bool(lines) if code is None else code], f"exit code {codes}: {run.text[-900:]}"
        assert "Traceback" not in run.text, run.text[-900:]
    for line in lines:
        assert os.strerror(_ERRORS[error]) in line, f"the reason is missing: {line}"
    comparing.check_no_litter(folder)
    for saved in run_folder.list_checkpoints(folder):
        assert seal.find_damage(saved) is None
    return lines


def _stops(setting: Setting, flags: list[str], case: tuple[str, int]) -> None:
    """The save at `_AT` fails, and so does another try."""
    folder = setting.folder / "-".join(map(str, ("stop", *case)))
    lines = _start(flags, folder, case, "step-", shim.FOR_GOOD, 1)
    # One for each save; steps are so short here that the next save may be due before all have agreed to stop.
    assert len(lines) in (2, 3), f"reported {len(lines)} times: {lines}"
    assert f"step-{_AT:08d}" in lines[0], lines[0]
    assert [f.name for f in run_folder.list_checkpoints(folder)] == ["step-00000006"]
    clear(folder)


def _stops_once(setting: Setting, flags: list[str], reference: Path, case: tuple[str, int]) -> None:
    """The save at `_AT` fails, and another try does not. (A folder need not be synced, so that call may fail in silence.)"""
    folder = setting.folder / "-".join(map(str, ("once", *case)))
    lines = _start(flags, folder, case, f"step-{_AT:08d}", shim.ONCE, None)
    newest = run_folder.list_checkpoints(folder)[-1]
    assert seal.step_of(newest) == max(comparing.losses(folder)), f"the last one is {newest.name}"
    if lines:
        assert len(lines) == 1, f"reported {len(lines)} times: {lines}"
        runs.finish(flags, folder)
    comparing.check_same(folder, reference, steps=24)
    clear(folder)


def _goes_on(setting: Setting, flags: list[str], reference: Path, case: tuple[str, int]) -> None:
    folder = setting.folder / "-".join(map(str, ("go-on", *case)))
    lines = _start([*flags, "--on-save-error", "go-on"], folder, case, f"step-{_AT:08d}", shim.FOR_GOOD, 0)
    assert len(lines) == 1, f"reported {len(lines)} times: {lines}"
    assert not (folder / f"step-{_AT:08d}").exists()
    comparing.check_same(folder, reference, steps=24)
    clear(folder)


def _killed(setting: Setting, flags: list[str], reference: Path, call: int) -> None:
    folder = setting.folder / f"killed-{call}"
    with runs.started(flags, folder, 1, partial(_arm, f"step-{_AT:08d}", call, shim.KILL, 0)) as run:
        assert run.wait() == [-signal.SIGKILL], run.text[-600:]
    runs.finish(flags, folder)
    comparing.check_same(folder, reference, steps=24)
    clear(folder)


def _all_full(setting: Setting, flags: list[str], call: int) -> None:
    folder = setting.folder / f"full-{call}"
    with runs.started(flags, folder, 1, partial(_arm, f"{folder.name}/", call * 5, shim.FOR_GOOD, errno.ENOSPC)) as run:
        codes = run.wait(60)
        assert codes == [1], f"exit code {codes}: {run.text[-900:]}"
        assert "Traceback" not in run.text, run.text[-900:]
        assert os.strerror(errno.ENOSPC) in run.text, run.text[-900:]
    comparing.check_no_litter(folder)
    assert all(seal.find_damage(saved) is None for saved in run_folder.list_checkpoints(folder))
    runs.finish(flags, folder)
    clear(folder)


# Slow disks, jumping clocks -------------------------------------------------------------------------------------------

_DELAY = 2.0  # seconds that a save takes


def slow(setting: Setting) -> list[Row]:
    row = Row(
        f"a disk on which a save takes {_DELAY:.0f} s",
        "no step waits for it, unless the save before is still being written; at the end all are there, as if unbroken",
    )
    check_all(row, range(setting.cases(5, 1)), partial(_slow_disk, setting))
    bar = "the run ends, with the same numbers"
    jumps = [(clock, jump, world) for world in (1, 2) for clock in ("time", "monotonic", "perf_counter") for jump in (
        -86400.0, -3.0, 3.0, 86400.0 * 365)]  # fmt: skip
    clocks = Row("a clock that jumps, by -1 day, -3 s, 3 s, 1 year", bar)
    check_all(clocks, jumps if setting.full else jumps[::7], partial(_jumping_clock, setting))
    return [row, clocks]


def _slow_disk(setting: Setting, number: int) -> None:
    folder, flags = setting.folder / f"slow-{number}", [*setting.data, *runs.SMALL_RUN, "--save-interval", 30]

    def prepare(rank: int) -> None:
        original = checkpoint._write

        def write(*args: Any) -> None:
            time.sleep(_DELAY)
            original(*args)

        checkpoint._write = write

    begun = time.monotonic()
    runs.finish(flags, folder, 1, prepare)
    assert time.monotonic() - begun > 2 * _DELAY, "the disk was not slow"
    lines = [line for line in comparing.metrics(folder) if "loss" in line]
    gaps = [b["time"] - a["time"] for a, b in itertools.pairwise(lines)]
    assert max(gaps) < _DELAY / 2, f"a step took {max(gaps):.2f} s"
    assert [f.name for f in run_folder.list_checkpoints(folder)] == ["step-00000030", "step-00000060"]
    comparing.check_same(folder, setting.unbroken[1])
    clear(folder)


def _jumping_clock(setting: Setting, case: tuple[str, float, int]) -> None:
    clock, jump, world = case
    folder, flags = setting.folder / "-".join(map(str, ("clock", *case))), [*setting.data, *runs.SMALL_RUN]

    def prepare(rank: int) -> None:
        original, calls = getattr(time, clock), [0]

        def jumping() -> float:
            calls[0] += 1
            return float(original()) + (jump if calls[0] > 40 else 0)

        setattr(time, clock, jumping)

    runs.finish(flags, folder, world, prepare)
    comparing.check_same(folder, setting.unbroken[world], world)
    clear(folder)
