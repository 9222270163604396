"""Runs whose checkpoints go to an object store: SIGKILL at its calls, and a store that is busy, slow, late or refuses.

A machine is a `--scratch-dir` here. What counts in the end is in the bucket: it is copied from there and compared."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from gpt2xla import storage
from gpt2xla.checkpoint import seal
from gpt2xla.checkpoint.bucket.mirror import Mirror
from gpt2xla.processes import lease
from gpt2xla.training.train_step import TrainStep
from tests.faults import comparing, recording, runs
from tests.faults.cases import Row, Setting, check_all, clear
from tests.object_server import ObjectServer, object_server

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

    def finish(self, machine: object, flags: Sequence[object] = (), world: int = 1) -> str:
        """Run to the end, and return the output. While the lease of a killed run looks alive, it is tried again."""
        deadline = time.monotonic() + 60
        while True:
            with self.started(machine, flags=flags, world=world) as run:
                codes, text = run.wait(), run.text
            if 2 not in codes or "in use by" not in text or time.monotonic() > deadline:
                assert codes == [0] * world, f"exit codes {codes}: {text[-900:]}"
                return text
            time.sleep(0.2)

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


def _short(setting: Setting) -> Setting:
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
        self.wait(None)

    Mirror.send = send_and_wait  # type: ignore[method-assign]


# SIGKILL --------------------------------------------------------------------------------------------------------------


def killed(setting: Setting) -> list[Row]:
    setting, rows = _short(setting), []
    for kind, every, name in (("s3", 1, "S3"), ("gs", 4, "GCS")):
        with object_server(kind) as server:
            calls = _calls(setting, server)
            row = Row(
                f"SIGKILL at each call that writes to the bucket, before or after it is carried out, {name}", EXACT
            )
            cases = [(call, before) for call in range(calls) for before in (True, False)]
            cases = cases[:: every if setting.full else len(cases) // 4]
            rows.append(check_all(row, cases, partial(_killed_at, setting, server)))
            row.notes.append(f"{calls} calls that write, in a run of {STEPS} steps with 4 checkpoints")
    with object_server() as server:
        row = Row("SIGKILL at calls at random, again and again, on new machines and on the same one", EXACT)
        cases = [(number, 1 + number % 4 // 3) for number in range(setting.cases(30, 2))]
        rows.append(check_all(row, cases, partial(_killed_again_and_again, setting, server)))
    return rows


def _calls(setting: Setting, server: ObjectServer) -> int:
    """Return how many calls that write an unbroken run makes."""
    place = Place(setting, server, f"counted-{server.kind}")
    with place.started("a", lambda _: in_step()) as run:
        assert run.wait() == [0], run.text[-900:]
    place.check()
    return sum(r.method in WRITES.split("|") and r.key.startswith(f"{place.name}/") for r in server.requests())


def _killed_at(setting: Setting, server: ObjectServer, case: tuple[int, bool]) -> None:
    call, before = case
    place = Place(setting, server, f"{server.kind}-{call}-{before}")

    def prepare(_: int) -> None:
        in_step()
        server.kill(os.getpid(), before, skip=call, method=WRITES, key=f"{place.name}/*")

    with place.started("a", prepare) as run:
        codes = run.wait()
        assert codes == [-signal.SIGKILL], f"the call was not reached, exit codes {codes}: {run.text[-600:]}"
    place.finish("b")
    place.check()


def _killed_again_and_again(setting: Setting, server: ObjectServer, case: tuple[int, int]) -> int:
    number, world = case
    draw, place = runs.random_of(setting.seed, "bucket", *case), Place(setting, server, f"again-{number}-{world}")
    kills, start = 0, 0
    while kills < 5:
        call, machine = draw.randrange(40), draw.choice(("same", f"machine-{start}"))
        start += 1

        def prepare(_: int, call: int = call) -> None:
            server.kill(os.getpid(), draw.random() < 0.5, skip=call, key=f"{place.name}/*")

        with place.started(machine, prepare, world=world) as run:
            code = run.processes[0].wait()
            if code != -signal.SIGKILL:
                assert code == 0 or "in use by" in run.text, f"exit code {code}: {run.text[-900:]}"
            kills += code == -signal.SIGKILL
            if code == 0:
                break
    server.clear()
    place.finish("last", world=world)
    place.check(world)
    return max(kills, 1)


# A store that fails ----------------------------------------------------------------------------------------------------


def failing(setting: Setting) -> list[Row]:
    setting = _short(setting)
    bar = "the run ends with 0; all is in the bucket as if nothing had happened"
    faults: dict[str, Callable[..., None]] = {
        "429": lambda server, **which: server.fail(429, **which),
        "500": lambda server, **which: server.fail(500, **which),
        "503": lambda server, **which: server.fail(503, **which),
        "cut bodies": lambda server, **which: server.cut(**which),
        "lost answers": lambda server, **which: server.lose(**which),
        "slow bodies": lambda server, **which: server.slow(200_000, **which),
    }
    row = Row("one in ten requests to the bucket gets 429, 500, 503, a body cut short or slow, or no answer", bar)
    cases = [
        (number, name, kind, fault) for number, (name, fault) in enumerate(faults.items()) for kind in ("s3", "gs")
    ]
    cases = [(number + 6 * again, *rest) for again in range(5) for number, *rest in cases]
    check_all(row, cases if setting.full else cases[:12:3], partial(_failing, setting))
    return [row, _expired(setting)]


def _failing(setting: Setting, case: tuple[int, str, str, Callable[..., None]]) -> None:
    number, name, kind, fault = case
    with object_server(kind) as server:
        place = Place(setting, server, f"{kind}-{number}-{name.replace(' ', '-')}")
        fault(server, probability=0.1, seed=number)
        if number % 2:
            _kill_somewhere(place, number)
        place.finish("b")
        assert any(request.fault for request in server.requests()), "no request had the fault"
        server.clear()
        place.check()


def _expired(setting: Setting) -> Row:
    row = Row(
        "credentials that expire in the middle of a run",
        "training continues to its end; exit code 1, one line that says what is safe; with new ones the same command sends "
        "the rest, without a step",
    )
    return check_all(row, range(setting.cases(10, 1)), partial(_expired_in, setting))


def _expired_in(setting: Setting, number: int) -> None:
    with object_server() as server:
        place = Place(setting, server, f"expired-{number}")
        with place.started("a", lambda _: in_step()) as run:
            wait_for(lambda: place.newest() >= 6 * (1 + number % 3) or run.processes[0].poll() is not None)
            server.expire_credentials()
            codes, text = run.wait(), run.text
        assert codes == [1], f"exit codes {codes}: {text[-900:]}"
        assert "Traceback" not in text, text[-900:]
        errors = [line for line in text.splitlines() if "error:" in line and line.startswith("run_pretrain")]
        assert len(errors) == 1, text[-1500:]
        assert "the newest checkpoint in" in text, text[-900:]
        newest = place.newest()
        assert newest < STEPS, "it was sent"
        assert max(comparing.losses(next(place.scratch("a").iterdir()))) == STEPS, "training did not continue"
        server.renew_credentials()
        text = place.finish("a")
        assert "nothing to do" in text, text[-900:]
        place.check()


# Clocks, lists, and two machines ---------------------------------------------------------------------------------------


def shared(setting: Setting) -> list[Row]:
    setting = _short(setting)
    clocks = Row("the server's clock is 1 day behind, or 1 hour ahead; a run is killed there", EXACT)
    cases = [(skew, number) for number in range(setting.cases(10, 1)) for skew in (-86400, 3600)]
    check_all(clocks, cases, partial(_skewed, setting))
    lists = Row("lists that show new objects only after 3 s; a run is killed there", EXACT)
    check_all(lists, range(setting.cases(20, 1)), partial(_late, setting))
    two = Row(
        "two machines on one prefix",
        "the second leaves with 2 and one line that names host and process of the first, which continues; after SIGKILL of "
        "the first, the second takes over once its lease has expired, and ends as if unbroken",
    )
    check_all(two, range(setting.cases(20, 1)), partial(_second_is_refused, setting))
    frozen = Row(
        "a machine that is frozen (SIGSTOP) until another one has taken over, and then wakes up",
        "it leaves with 1, or with 0 if it was done; the other one ends as if unbroken",
    )
    check_all(frozen, range(setting.cases(20, 1)), partial(_frozen, setting))
    stopped = Row(
        "SIGTERM while a checkpoint takes longer to send than --grace-seconds",
        "the process is gone within 5 s of them, with 1 and one line that says which step is safe; " + EXACT,
    )
    check_all(stopped, range(setting.cases(10, 1)), partial(_out_of_grace, setting))
    return [clocks, lists, two, frozen, stopped]


def _kill_somewhere(place: Place, number: int) -> None:
    """SIGKILL the run at a call, a different one for each number."""

    def prepare(_: int) -> None:
        place.server.kill(os.getpid(), number % 2 == 0, skip=25 + 7 * number % 60, method=WRITES, key=f"{place.name}/*")

    with place.started("a", prepare) as run:
        codes = run.wait()
        assert codes in ([-signal.SIGKILL], [0]), f"exit codes {codes}: {run.text[-900:]}"


def _skewed(setting: Setting, case: tuple[int, int]) -> None:
    skew, number = case
    with object_server("gs" if number % 2 else "s3") as server:
        server.set_clock(skew)
        place = Place(setting, server, f"clock-{skew}-{number}")
        _kill_somewhere(place, number)
        place.finish("b")
        place.check()


def _late(setting: Setting, number: int) -> None:
    with object_server("gs" if number % 2 else "s3") as server:
        server.list_late(3)
        place = Place(setting, server, f"late-{number}")
        _kill_somewhere(place, number)
        # It says so as soon as a checkpoint is whole, or is killed before.
        latest = int((server.read(f"{place.name}/latest") or b"step-0")[5:])
        newest, taken = place.newest(), len(recording.read(place.folder))
        place.finish("b")
        first = next((line["step"] for line in recording.read(place.folder)[taken:]), STEPS + 1)
        assert latest < first <= newest + 1, f"from step {first}, although step {latest} was there, and {newest} new"
        place.check(is_pruned=False)  # the run is over before lists show what it has sent


def _second_is_refused(setting: Setting, number: int) -> None:
    with object_server("gs" if number % 2 else "s3") as server, _holding(setting, server, number) as (place, first):
        with place.started("b") as second:
            codes, text = second.wait(60), second.text
        assert codes == [2], f"exit codes {codes}: {text[-900:]}"
        errors = [line for line in text.splitlines() if "error:" in line]
        assert len(errors) == 1, text[-900:]
        assert f"process {first.processes[0].pid} on {os.uname().nodename}" in errors[0], errors[0]
        assert first.processes[0].poll() is None, f"the first was disturbed: {first.text[-900:]}"
        first.processes[0].send(signal.SIGKILL)
        first.wait()
        place.finish("b")
        place.check()


def _frozen(setting: Setting, number: int) -> None:
    with object_server("gs" if number % 2 else "s3") as server, _holding(setting, server, number) as (place, first):
        first.processes[0].send(signal.SIGSTOP)
        place.finish("b")
        before = server.snapshot(f"{place.name}/step-")
        first.processes[0].send(signal.SIGCONT)
        codes = first.wait()
        assert codes == [1], f"exit codes {codes}: {first.text[-900:]}"
        assert "Traceback" not in first.text, first.text[-900:]
        assert server.snapshot(f"{place.name}/step-") == before, "it wrote after it had lost"
        # Steps that it took again do not count: they are not in the bucket.
        place.check()


@contextmanager
def _holding(setting: Setting, server: ObjectServer, number: int) -> Iterator[tuple[Place, runs.Run]]:
    """Start a run that trains slowly, and wait until it has sent something."""
    place = Place(setting, server, f"held-{number}")

    with place.started("a", lambda _: _slow_after(6 * (1 + number % 2), 1.0)) as first:
        wait_for(lambda: place.newest() >= 6 * (1 + number % 2) or first.processes[0].poll() is not None)
        assert first.processes[0].poll() is None, f"it exited early: {first.text[-900:]}"
        yield place, first


def _slow_after(step: int, seconds: float) -> None:
    """Let each update after `step` take so much longer."""
    update = TrainStep.__call__

    def slowed(self: TrainStep, batches: Any, before: int, *rest: Any) -> Any:
        if before >= step:
            time.sleep(seconds)
        return update(self, batches, before, *rest)

    TrainStep.__call__ = slowed  # type: ignore[method-assign]


def _out_of_grace(setting: Setting, number: int) -> None:
    grace = 3
    with object_server() as server:
        place = Place(setting, server, f"grace-{number}")
        with place.started("a", lambda _: _slow_after(6, 0.3), ["--grace-seconds", grace]) as run:
            wait_for(lambda: place.newest() >= 6)
            server.slow(5_000, method="PUT|POST", key=f"{place.name}/step-*")
            wait_for(lambda: any(request.fault for request in server.requests()))
            run.processes[0].send(signal.SIGTERM)
            begun = time.monotonic()
            codes, text = run.wait(60), run.text
            seconds = time.monotonic() - begun
        assert codes == [1], f"exit codes {codes}: {text[-900:]}"
        assert seconds < grace + 5, f"it took {seconds:.1f} s"
        assert f"is of step {place.newest()}" in text, text[-900:]
        server.clear()
        place.finish("b")
        place.check()


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.02)
