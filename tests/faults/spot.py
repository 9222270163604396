"""Weeks of a spot run in minutes: machines with empty disks come, are taken away, and others continue from the bucket."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gpt2xla.processes import lease
from tests.faults import comparing, runs
from tests.faults.cases import Row, Setting
from tests.object_server import ObjectServer, object_server

_STEPS, _SAVE_EVERY = 3000, 6
_GRACE = 30.0  # seconds between SIGTERM and SIGKILL, where a machine is given any
_PATIENCE = 900.0
_RENEWED, _EXPIRES = 0.5, 3.0  # a lease's times, in seconds: these machines are replaced at once


@dataclass
class _Tale:
    """What happened to a run."""

    lost_steps: list[int] = field(default_factory=list)  # with each preemption, made and not in the bucket
    starts: list[float] = field(default_factory=list)  # seconds from a machine's start to its first new step
    seconds: float = 0.0
    machines: int = 0
    graceful: int = 0  # preemptions with a warning, by which the run had ended by itself


def preempted(setting: Setting) -> list[Row]:
    """A run that is preempted again and again; on one host at a time, and on one or two in turn."""
    rows = []
    for hosts, full, smoke in ((False, 200, 3), (True, 50, 3)):
        what = "1, 2, 1, ... hosts without a shared disk" if hosts else "one host"
        bar = "losses within 1e-5" if hosts else "it ends as if unbroken, bit for bit"
        row = Row(f"a spot run in a bucket, {what}: preempted at random, half of the times without a warning", bar)
        rows.append(row)
        preemptions, begun = setting.cases(full, smoke), time.monotonic()
        try:
            row.notes += _lived_through(setting, preemptions, hosts)
            row.add(True, preemptions)
        except AssertionError as error:
            print(f"    FAILED: {error}", flush=True)
            row.add(False, preemptions)
            row.notes.append(f"failed: {str(error).splitlines()[0]}")
        row.seconds = time.monotonic() - begun
    return rows


def _lived_through(setting: Setting, preemptions: int, changes_hosts: bool) -> list[str]:
    steps = max(runs.STEPS, _STEPS * preemptions // 200)
    flags = [
        *setting.data,
        *runs.SMALL_RUN,
        "--train-steps",
        steps,
        "--decay-steps",
        steps,
        "--save-interval",
        _SAVE_EVERY,
    ]
    flags += ["--valid-interval", 50]
    place = setting.folder / ("hosts" if changes_hosts else "host")
    place.mkdir()
    unbroken, begun = place / "unbroken", time.monotonic()
    with runs.started(flags, unbroken) as run:
        assert run.wait(_PATIENCE) == [0], run.text[-600:]
    undisturbed = time.monotonic() - begun
    with object_server("s3") as server:
        tale = _Tale()
        draw, begun = runs.random_of(setting.seed, "spot", changes_hosts), time.monotonic()
        while len(tale.lost_steps) < preemptions:
            world = 1 + (tale.machines % 2 if changes_hosts else 0)
            most = undisturbed * 2 / preemptions + 0.2
            _one_machine(server, flags, place, world, steps, tale, partial(draw.uniform, 0, most), draw.random() < 0.5)
        _one_machine(server, flags, place, 1, steps, tale, None, False)
        tale.seconds = time.monotonic() - begun
        uploads = [json.loads(line) for line in server.read("run/uploads.jsonl").splitlines()]
        fetched = _download(server, place / "end")
    if changes_hosts:
        comparing.check_close(fetched, unbroken)
    else:
        (fetched / "latest").unlink()  # a link in a folder
        os.symlink(f"step-{steps:08d}", fetched / "latest")
        comparing.check_same(fetched, unbroken, windows=False, steps=steps)
    lost = tale.lost_steps
    shutil.rmtree(place)
    return [
        f"{preemptions} preemptions of a run of {steps:,} steps with a checkpoint every {_SAVE_EVERY}, {tale.graceful} of "
        f"them with a warning of {_GRACE:.0f} s; steps made again: {statistics.mean(lost):.1f} a preemption on average, "
        f"{max(lost)} at most; a checkpoint of {uploads[-1]['bytes'] / 1e6:.1f} MB was sent in "
        f"{statistics.median(line['seconds'] for line in uploads):.2f} s (median); a start took "
        f"{statistics.median(tale.starts):.1f} s to its first step; {tale.seconds:.0f} s in all, {undisturbed:.0f} s "
        f"unbroken: {1 - undisturbed / tale.seconds:.0%} of the time was lost, as a machine lived less than 2 s after its "
        "first step"
    ]


def _one_machine(
    server: ObjectServer,
    flags: list[Any],
    place: Path,
    world: int,
    last_step: int,
    tale: _Tale,
    lifetime: Callable[[], float] | None,
    is_warned: bool,
) -> None:
    """Start the run on a machine, or `world` of them, with empty disks. Take it away so long after its first new step; with
    None, let it end."""
    homes = Path(tempfile.mkdtemp(dir=place, prefix="machine-"))

    def boot(rank: int) -> None:
        os.environ.update(server.environment, HOME=str(homes / str(rank)))
        lease.RENEWED_EVERY, lease.EXPIRES_AFTER = _RENEWED, _EXPIRES

    tale.machines += 1
    begun = time.monotonic()
    with runs.started(flags, homes / "run", world, boot, server.url) as run:
        if lifetime is None:
            codes = run.wait(_PATIENCE)
            assert codes == [0] * world, f"exit codes {codes}: {run.text[-800:]}"
            shutil.rmtree(homes)
            return
        while not (made := _step(homes)) and run.processes[0].poll() is None:
            assert time.monotonic() < begun + 120, f"no step in 120 s: {run.text[-800:]}"
            time.sleep(0.01)
        tale.starts.append(time.monotonic() - begun)
        runs.sleep_until(time.monotonic() + lifetime())
        if is_warned:
            for process in run.processes:
                process.send(signal.SIGTERM)
            codes = run.wait(_GRACE)
            code = 0 if "done: " in run.text else 128 + signal.SIGTERM
            assert codes == [code] * world, f"exit codes {codes} instead of {code}: {run.text[-800:]}"
            tale.graceful += 1
        for process in run.processes:
            process.send(signal.SIGKILL)
        codes = run.wait()
        assert is_warned or set(codes) <= {0, -signal.SIGKILL}, f"exit codes {codes}: {run.text[-800:]}"
        made = _step(homes)
    tale.lost_steps.append(max(0, made - _safe_step(server)))
    shutil.rmtree(homes)


def _step(homes: Path) -> int:
    """Return the last step that the machine has made; 0 if there is none."""
    lines = (homes / "run.steps-0").read_bytes().split(b"\n")[:-1] if (homes / "run.steps-0").exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _safe_step(server: ObjectServer) -> int:
    steps = [int(name.split("/")[1][5:]) for name in server.objects("run/step-") if name.endswith("/COMPLETE")]
    return max(steps, default=0)


def _download(server: ObjectServer, folder: Path) -> Path:
    for name in server.objects("run/"):
        file = folder / name.removeprefix("run/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(server.read(name))
    return folder
