"""Checkpoints that are truncated or altered, or have a file missing."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from gpt2xla.checkpoint import run_folder
from gpt2xla.checkpoint.start import find_start
from gpt2xla.cli import parse_run
from gpt2xla.config import TorchConfig
from gpt2xla.errors import InputError
from tests.faults import comparing, runs
from tests.faults.cases import Row, Setting, check_all, clear

KINDS = ("truncated", "a bit flipped", "missing", "empty", "bytes added")
_FILES = "every file of a checkpoint"


def damaged(setting: Setting) -> list[Row]:
    """Damage the newest of two checkpoints, one file at a time."""
    origin = setting.folder / "origin"
    flags = [*setting.data, *runs.SMALL_RUN, "--tokenizer", "bytes", "--vocab-size", "257"]
    runs.finish([*flags, "--train-steps", "30"], origin)
    names = sorted(path.relative_to(origin / "step-00000030").as_posix() for path in files_of(origin / "step-00000030"))
    cases = [(number, names[number % len(names)], KINDS[number // len(names) % len(KINDS)]) for number in range(200)]
    cases = cases if setting.full else cases[: len(names) * len(KINDS)]

    bar = "detected, the file named; auto takes the one before; the path itself is refused with an InputError"
    row = check_all(Row(f"{_FILES} truncated, a bit flipped, missing, empty, longer", bar), cases, partial(
        _detected, setting, origin, flags))  # fmt: skip

    flags = [*setting.data, *runs.SMALL_RUN]
    bar = "auto says so, continues from the one before, ends as if unbroken, bit for bit; the path is exit code 2, one line"
    names = sorted(path.relative_to(setting.unbroken[1] / "step-00000060").as_posix() for path in files_of(
        setting.unbroken[1] / "step-00000060"))  # fmt: skip
    pairs = [(name, kind) for kind in KINDS for name in names]
    pairs = pairs[:: 1 if setting.full else 7]
    ended = check_all(Row("the same, whole runs", bar), pairs, partial(_runs_on, setting, flags))
    return [row, ended]


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def damage(file: Path, kind: str, draw: float) -> None:
    data = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        os.truncate(file, int(draw * len(data)))
    elif kind == "empty":
        os.truncate(file, 0)
    elif kind == "bytes added":
        file.write_bytes(data + b"\0" * 7)
    else:
        place = int(draw * len(data) * 8)
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)


def _copy_damaged(setting: Setting, origin: Path, folder: Path, step: int, name: str, kind: str) -> Path:
    shutil.copytree(origin, folder, symlinks=True)
    draw = runs.random_of(setting.seed, folder.name).random()
    damage(folder / f"step-{step:08d}" / name, kind, draw)
    return folder / f"step-{step:08d}"


def _detected(setting: Setting, origin: Path, flags: list[str], case: tuple[int, str, str]) -> None:
    number, name, kind = case
    folder = setting.folder / f"damage-{number}"
    newest = _copy_damaged(setting, origin, folder, 30, name, kind)
    argv = [*flags, "--checkpoints-dir", str(folder)]
    start = find_start(parse_run(TorchConfig, argv)[0])
    assert start.source == folder / "step-00000024", f"auto took {start.source}"
    assert any(name in note for note in start.notes), f"auto does not name {name}: {start.notes}"
    for asked in ("--resume", "--from-checkpoint"):
        away = ["--checkpoints-dir", str(setting.folder / "elsewhere")] if asked == "--from-checkpoint" else []
        refusal = _refusal_of([*argv, *away, asked, str(newest)])
        assert refusal is not None, f"{asked} took the damaged checkpoint"
        assert name in refusal, f"{asked} does not name {name}: {refusal}"
    clear(folder)


def _refusal_of(argv: list[str]) -> str | None:
    try:
        find_start(parse_run(TorchConfig, argv)[0])
    except InputError as error:
        return str(error)
    return None


def _runs_on(setting: Setting, flags: list[str], case: tuple[str, str]) -> None:
    name, kind = case
    folder = setting.folder / f"whole-{name}-{kind}".replace(" ", "_")
    shutil.copytree(setting.unbroken[1], folder, symlinks=True)
    shutil.copy(setting.unbroken[1].with_name(f"{setting.unbroken[1].name}.steps-0"), f"{folder}.steps-0")
    newest = folder / "step-00000060"
    damage(newest / name, kind, runs.random_of(setting.seed, *case).random())
    with runs.started([*flags, "--resume", newest], folder) as run:
        assert run.wait() == [2], run.text[-600:]
        assert name in run.text, f"{name} is not named: {run.text[-600:]}"
        assert len(run.text.splitlines()) == 1, run.text[-600:]
    assert run_folder.list_checkpoints(folder)[0].name == "step-00000054", "the refused start changed the folder"
    text = runs.finish(flags, folder)
    assert name in text, f"auto does not name {name}: {text[:600]}"
    comparing.check_same(folder, setting.unbroken[1])
    clear(folder)
