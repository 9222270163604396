"""All scenarios by name, and the undisturbed runs that they are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import (
    best,
    bucket,
    bucket_machines,
    damage,
    decays,
    disk,
    folders,
    kills,
    moving,
    nonfinite,
    runs,
    spot,
    stops,
    tested,
)
from tests.faults.cases import Row, Setting

ALL: dict[str, Callable[[Setting], list[Row]]] = {
    "kill": kills.whole_runs,
    "kill-in-save": kills.points_of_a_save,
    "kill-one": kills.one_of_two,
    "decay": decays.decayed,
    "signals": stops.signalled,
    "best": best.best,
    "damage": damage.damaged,
    "disk": disk.failing,
    "slow": disk.slow,
    "nonfinite": nonfinite.nonfinite,
    "shared-folder": folders.shared_folder,
    "bucket-kill": bucket.killed,
    "bucket-kill-again": bucket.killed_again,
    "bucket-fail": bucket.failing,
    "bucket-machines": bucket_machines.shared,
    "moved": moving.moved,
    "launched": moving.launched,
    "spot": spot.preempted,
    "tested": tested.tested,
}


def undisturbed(base: Path) -> tuple[list[str], dict[int, Path], dict[int, float]]:
    """Return the flags that name the data and, by the number of processes, an undisturbed run and its seconds."""
    data = runs.write_data(base / "data")
    unbroken, seconds = {}, {}
    for world in (1, 2):
        unbroken[world] = base / f"unbroken-{world}"
        begun = time.monotonic()
        runs.finish([*data, *runs.SMALL_RUN], unbroken[world], world)
        seconds[world] = time.monotonic() - begun
    return data, unbroken, seconds


def setting(folder: Path, made: tuple[list[str], dict[int, Path], dict[int, float]], full: bool, seed: int) -> Setting:
    folder.mkdir()
    return Setting(folder, *made, full, seed)
