"""Runs that change the runtime or the number of processes when they resume; and faults under the real launchers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from gpt2xla.checkpoint import run_folder, seal
from tests.faults import comparing, recording, runs
from tests.faults.cases import Row, Setting, check_all, clear
from tests.faults.kills import check_names_rank, wait_for_training
from tests.faults.spoilt_xla import AT

Launch = Callable[[list[object], Path], AbstractContextManager[runs.Run]]
_PATIENCE = 240.0  # imports and compiling included, on a machine that is shared


def moved(setting: Setting) -> list[Row]:
    bar = "the same windows in each step; losses within 1e-5 relative"
    worlds = Row("resumed with 1, 2, 1 processes and 2, 1, 2", bar)
    cases = [(first, a, b) for first in (1, 2) for a, b in ((12, 36), (18, 24), (6, 54), (30, 42), (24, 48))]
    check_all(worlds, cases if setting.full else cases[::5], partial(_other_worlds, setting))
    runtimes = Row("resumed torch to XLA to torch, XLA to torch to XLA, XLA to 2 replicas (`run_pretrain_xla.py`)", bar)
    plans = [["torch", "xla", "torch"], ["xla", "torch", "xla"], ["xla", "replicas", "torch"]] if setting.full else []
    check_all(runtimes, plans, partial(_other_runtimes, setting))
    return [worlds, runtimes]


def _other_worlds(setting: Setting, case: tuple[int, int, int]) -> None:
    first, a, b = case
    folder, flags = setting.folder / "-".join(map(str, case)), [*setting.data, *runs.SMALL_RUN]
    rows: dict[int, list[str]] = {}
    for end, world in ((a, first), (b, 3 - first), (runs.STEPS, first)):
        runs.finish([*flags, "--train-steps", end], folder, world)
        rows |= recording.windows(folder, world)
        for rank in range(world):
            folder.with_name(f"{folder.name}.steps-{rank}").unlink()
    assert rows == recording.windows(setting.unbroken[1]), "other windows"
    comparing.check_close(folder, setting.unbroken[1])
    clear(folder)


def _other_runtimes(setting: Setting, plan: list[str]) -> None:
    """Compare the losses: the windows of XLA's steps are not recorded."""
    folder, flags = setting.folder / "-".join(plan), [*setting.data, *runs.SMALL_RUN]
    for end, runtime in zip((24, 36, runs.STEPS), plan, strict=True):
        until = [*flags, "--train-steps", end]
        if runtime == "torch":
            runs.finish(until, folder)
        else:
            with runs.xla(until, folder, 2 if runtime == "replicas" else 1) as run:
                assert run.wait(_PATIENCE) == [0], run.text[-900:]
    comparing.check_close(folder, setting.unbroken[1])
    clear(folder)


# The real launchers ---------------------------------------------------------------------------------------------------


def launched(setting: Setting) -> list[Row]:
    """Test few cases each, because every start imports and compiles for 5 to 40 s."""
    replicas: Launch = partial(runs.xla, replicas=2)
    ways: dict[str, Launch] = {"torchrun": runs.torchrun, "XLA:CPU": runs.xla, "XLA:CPU, 2 replicas": replicas}
    both = "under torchrun and `run_pretrain_xla.py`"
    kills = Row(f"SIGKILL of all processes, {both}", "started again, it ends as if unbroken, bit for bit")
    stops = Row(
        f"SIGTERM and SIGINT, {both}",
        "exit code 143 or 130 (torchrun: 1, its own) and a checkpoint; the same command continues and ends as if unbroken, "
        "bit for bit",
    )
    ones = Row(
        "one of two processes killed, under torchrun and as XLA:CPU replicas",
        "all leave within 30 s with a code above 0; the message names the rank; no process is left",
    )
    spoilt = Row(
        "NaN in the loss of one process, `run_pretrain_xla.py`",
        "all leave with 1; one line names step and windows; nothing is saved after; started again, it ends as if unbroken",
    )
    if not setting.full:
        check_all(ones, [("torchrun", runs.torchrun, 1)], partial(_one_killed, setting))
        return [kills, stops, ones, spoilt]
    for name, way in ways.items():
        unbroken = setting.folder / f"unbroken-{name}".replace(" ", "_")
        with way([*setting.data, *runs.SMALL_RUN], unbroken) as run:
            assert run.wait(_PATIENCE) == [0], run.text[-900:]
        cases = [(name, way, unbroken, number) for number in range(4 if name == "torchrun" else 3)]
        check_all(kills, cases, partial(_killed, setting))
        check_all(stops, cases[:2], partial(_stopped, setting))
        check_all(spoilt, cases[: name != "torchrun"], partial(_spoilt, setting))
        for row, count in ((kills, len(cases)), (stops, 2), (spoilt, int(name != "torchrun"))):
            row.notes += [f"{count} with {name}"] if count else []
    cases = [(f"{number}-torchrun", runs.torchrun, number % 2) for number in range(4)]
    cases += [(f"{victim}-replicas", replicas, victim) for victim in (0, 1)]
    check_all(ones, cases, partial(_one_killed, setting))
    ones.notes.append("4 under torchrun, 2 as XLA:CPU replicas")
    return [kills, stops, ones, spoilt]


def _killed(setting: Setting, case: tuple[str, Launch, Path, int]) -> None:
    name, way, unbroken, number = case
    folder = setting.folder / f"killed-{name}-{number}".replace(" ", "_")
    flags = [*setting.data, *runs.SMALL_RUN]
    with way(flags, folder) as run:
        wait_for_training(folder, run, 3 + 15 * number, _PATIENCE)
        run.kill()
    with way(flags, folder) as run:
        assert run.wait(_PATIENCE) == [0], run.text[-900:]
    comparing.check_same(folder, unbroken, windows=False)
    clear(folder)


def _stopped(setting: Setting, case: tuple[str, Launch, Path, int]) -> None:
    name, way, unbroken, number = case
    folder = setting.folder / f"stopped-{name}-{number}".replace(" ", "_")
    flags = [*setting.data, *runs.SMALL_RUN]
    with way(flags, folder) as run:
        wait_for_training(folder, run, 5 + 20 * number, _PATIENCE)
        run.processes[0].send(sent := signal.SIGINT if number % 2 else signal.SIGTERM)
        code = run.wait(_PATIENCE)[0]
        assert code == (1 if "torchrun" in name else 128 + sent), f"exit code {code}: {run.text[-900:]}"
        assert seal.step_of(run_folder.list_checkpoints(folder)[-1]) == max(comparing.losses(folder))
        _check_no_orphans(run, 5)
        if "torchrun" in name:
            assert "stopped by" in run.text, run.text[-900:]
            assert "FAILED" not in run.text, run.text[-900:]
    with way(flags, folder) as run:
        assert run.wait(_PATIENCE) == [0], run.text[-900:]
    comparing.check_same(folder, unbroken, windows=False)
    clear(folder)


def _spoilt(setting: Setting, case: tuple[str, Launch, Path, int]) -> None:
    name, way, unbroken, _ = case
    folder = setting.folder / f"spoilt-{name}".replace(" ", "_")
    flags, replicas = [*setting.data, *runs.SMALL_RUN], 2 if "replicas" in name else 1
    with runs.xla(flags, folder, replicas, program_file="tests/faults/spoilt_xla.py") as run:
        code, text = run.wait(_PATIENCE)[0], run.text
    assert code == 1, f"exit code {code}: {text[-900:]}"
    errors = [line for line in text.splitlines() if "error:" in line]
    assert len(errors) == 1, text[-900:]
    assert f"step {AT}:" in errors[0], errors[0]
    assert "windows" in errors[0], errors[0]
    assert max(map(seal.step_of, run_folder.list_checkpoints(folder))) == AT // runs.SAVE_EVERY * runs.SAVE_EVERY
    with way(flags, folder) as run:
        assert run.wait(_PATIENCE) == [0], run.text[-900:]
    comparing.check_same(folder, unbroken, windows=False)
    clear(folder)


def _one_killed(setting: Setting, case: tuple[str, Launch, int]) -> None:
    name, way, victim = case
    folder = setting.folder / f"one-{name}-{victim}"
    with way([*setting.data, *runs.SMALL_RUN, "--train-steps", 100000, "--save-interval", 200], folder) as run:
        wait_for_training(folder, run, 5, _PATIENCE)
        ranks = _ranks(run)
        assert len(ranks) == 2, f"its processes: {ranks}"
        os.kill(ranks[victim], signal.SIGKILL)
        killed = time.monotonic()
        code = run.wait(60)[0]
        seconds = time.monotonic() - killed
        assert code is not None, "it does not leave within 60 s"
        assert code > 0, f"exit code {code}: {run.text[-900:]}"
        assert seconds < 30, f"it took {seconds:.0f} s"
        _check_no_orphans(run, 30 - seconds)
        check_names_rank(_without_torchrun(run.text), victim)
    clear(folder)


def _check_no_orphans(run: runs.Run, seconds: float) -> None:
    """Wait for Python's resource tracker and torchrun's own processes, which may exit a little after their parent."""
    deadline = time.monotonic() + seconds
    while (left := run.orphans()) and time.monotonic() < deadline:
        time.sleep(0.1)
    named = {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in left}
    assert not left, f"still there: {named}"


def _without_torchrun(text: str) -> str:
    """torchrun itself ends with a traceback, whatever its processes say."""
    return text.split("torch/distributed/run.py")[0].split(
        'Traceback (most recent call last):\n  File "<frozen runpy>'
    )[0]


def _ranks(run: runs.Run) -> list[int]:
    """Return the processes that train, by rank, which is the order of their start."""
    found = []
    launcher = run.processes[0].pid
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for pid in map(int, children):
        command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if any(word.endswith("run_pretrain.py") or "spawn_main" in word for word in command):
            found.append(pid)
    return found
