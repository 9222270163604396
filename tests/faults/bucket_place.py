"""A run in a bucket and its machines: a machine is a `--scratch-dir`. What counts in the end is in the bucket: it is copied
from there and compared."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpt2xla import storage
from gpt2xla.checkpoint import seal
from gpt2xla.checkpoint.bucket.mirror import Mirror
from gpt2xla.processes import lease
from gpt2xla.training.train_step import TrainStep
from tests.faults import comparing, runs
from tests.faults.cases import Setting, clear
from tests.object_server import ObjectServer

STEPS = 24
WRITES = "PUT|POST|DELETE"
_RUN = [*runs.SMALL_RUN, "--train-steps", STEPS]
# So that nobody waits for a minute until a killed run's lease has expired. S3 tells times in whole seconds.
_RENEWED_EVERY, _EXPIRES_AFTER = 0.4, 2.0
EXACT = "the same command on an empty disk ends as if unbroken: losses, windows, validation, weights, optimizer, bit for bit"


class Place:
    """A run's folder in a bucket, and machines that have nothing else in common."""

    def __init__(self, setting: Setting, server: ObjectServer, name: str) -> None:
        self.setting, self.server, self.name = setting, server, name
        self.folder, self.url = setting.folder / name, server.at(name)

    def started(
        self, machine: object, prepare: runs.Prepare | None = None, flags: Sequence[object] = (), world: int = 1
    ) -> Any:
        """Start the run on a machine, as a process that reaches the server as any program does."""

        def prepare_all(rank: int) -> None:
            os.environ.update(self.server.environment)
            lease.RENEWED_EVERY, lease.EXPIRES_AFTER = _RENEWED_EVERY, _EXPIRES_AFTER
            storage.RETRY_WAITS = (0.1, 0.2, 0.4)
            if prepare and rank == 0:
                prepare(rank)

        where = ["--scratch-dir", self.scratch(machine)]
        return runs.started([*self.setting.data, *_RUN, *flags, *where], self.folder, world, prepare_all, self.url)

    def scratch(self, machine: object) -> Path:
        return self.folder.with_name(f"{self.folder.name}.machine-{machine}")

    def finish(self, machine: object, world: int = 1) -> str:
        """Run to the end, and return the output. Raises AssertionError unless all processes exit with 0."""
        with self.started(machine, world=world) as run:
            codes = run.wait()
            assert codes == [0] * world, f"exit codes {codes}: {run.text[-900:]}"
            return run.text

    def copied(self) -> Path:
        """Return a folder with what is in the bucket."""
        folder = self.folder.with_name(f"{self.folder.name}.bucket")
        for name, content in self.server.snapshot(f"{self.name}/").items():
            file = folder / name.removeprefix(f"{self.name}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        latest = (folder / "latest").read_text()
        (folder / "latest").unlink()
        (folder / "latest").symlink_to(latest)
        for steps in self.folder.parent.glob(f"{self.folder.name}.steps-*"):
            steps.with_name(steps.name.replace(self.folder.name, folder.name, 1)).write_bytes(steps.read_bytes())
        return folder

    def check(self, world: int = 1, is_pruned: bool = True) -> None:
        """Raise AssertionError unless what is in the bucket is as an unbroken run leaves it; then delete all of it."""
        folder = self.copied()
        comparing.check_same(folder, self.setting.unbroken[world], world, steps=STEPS)
        steps = sorted(path.name for path in folder.glob("step-*"))
        damages = [damage for name in steps if (damage := seal.find_damage(folder / name))]
        assert not damages, f"in the bucket: {damages}"
        assert len(steps) <= 2 or not is_pruned, f"more than --saved-checkpoint-limit: {steps}"
        assert not list(folder.glob("lease/probe-*")), "left behind in lease/"
        self.server.remove(f"{self.name}/")
        clear(self.folder)

    def newest(self) -> int:
        """Return the step of the newest whole checkpoint in the bucket, 0 if there is none."""
        whole = [name.split("/")[1] for name in self.server.objects(f"{self.name}/step-") if name.endswith("/COMPLETE")]
        return max((int(name[5:]) for name in whole), default=0)


def short(setting: Setting) -> Setting:
    """Return the setting with unbroken runs of so many steps, which had only a disk."""
    import s3fs  # noqa: F401  once, and not in each fork; neither starts a thread

    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read when it is imported
    import gcsfs  # noqa: F401

    unbroken = {world: setting.folder / f"unbroken-{world}" for world in (1, 2)}
    for world, folder in unbroken.items():
        runs.finish([*setting.data, *_RUN], folder, world)
    return dataclasses.replace(setting, unbroken=unbroken)


def in_step() -> None:
    """Let this run train on only when a checkpoint is sent, so that every run makes the same calls."""
    send, lease.RENEWED_EVERY = Mirror.send, 1000.0

    def send_and_wait(self: Mirror, checkpoint: Path) -> None:
        send(self, checkpoint)
        self.wait()

    Mirror.send = send_and_wait  # type: ignore[method-assign]


def slow_after(step: int, seconds: float) -> None:
    """Let each update after `step` take so much longer."""
    update = TrainStep.__call__

    def slowed(self: TrainStep, batches: Any, before: int, *rest: Any) -> Any:
        if before >= step:
            time.sleep(seconds)
        return update(self, batches, before, *rest)

    TrainStep.__call__ = slowed  # type: ignore[method-assign]


def kill_somewhere(place: Place, number: int) -> None:
    """SIGKILL the run at a call, a different one for each number."""

    def prepare(_: int) -> None:
        place.server.kill(os.getpid(), number % 2 == 0, skip=25 + 7 * number % 60, method=WRITES, key=f"{place.name}/*")

    with place.started("a", prepare) as run:
        codes = run.wait()
        assert codes in ([-signal.SIGKILL], [0]), f"exit codes {codes}: {run.text[-900:]}"


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.02)
