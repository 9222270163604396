"""Machines that share a bucket: one after another, with clocks and lists that are wrong, or two at the same time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from tests.faults import recording, runs
from tests.faults.bucket_place import EXACT, STEPS, Place, kill_somewhere, short, slow_after, wait_for
from tests.faults.cases import Row, Setting, check_all
from tests.object_server import ObjectServer, object_server


def shared(setting: Setting) -> list[Row]:
    setting = short(setting)
    clocks = Row("the server's clock is 1 day behind, or 1 hour ahead; a run is killed there", EXACT)
    cases = [(skew, number) for number in range(setting.cases(5, 1)) for skew in (-86400, 3600)]
    check_all(clocks, cases, partial(_skewed, setting))
    lists = Row("lists that show new objects only after 3 s; a run is killed there", EXACT)
    check_all(lists, range(setting.cases(10, 1)), partial(_late, setting))
    two = Row(
        "two machines on one prefix",
        "the second leaves with 2 and one line that names host and process of the first, which continues; after SIGKILL of "
        "the first, the second takes over once its lease has expired, and ends as if unbroken",
    )
    check_all(two, range(setting.cases(10, 1)), partial(_second_is_refused, setting))
    frozen = Row(
        "a machine that is frozen (SIGSTOP) until another one has taken over, and then wakes up",
        "it leaves with 1 and has changed no checkpoint; the other one ends as if unbroken",
    )
    check_all(frozen, range(setting.cases(10, 1)), partial(_frozen, setting))
    stopped = Row(
        "SIGTERM while a checkpoint takes longer to send than --grace-seconds",
        "the process is gone within 5 s of them, with 1 and one line that says which step is safe; " + EXACT,
    )
    check_all(stopped, range(setting.cases(10, 1)), partial(_out_of_grace, setting))
    return [clocks, lists, two, frozen, stopped]


def _skewed(setting: Setting, case: tuple[int, int]) -> None:
    skew, number = case
    with object_server("gs" if number % 2 else "s3") as server:
        server.set_clock(skew)
        place = Place(setting, server, f"clock-{skew}-{number}")
        kill_somewhere(place, number)
        place.finish("b")
        place.check()


def _late(setting: Setting, number: int) -> None:
    with object_server("gs" if number % 2 else "s3") as server:
        server.list_late(3)
        place = Place(setting, server, f"late-{number}")
        kill_somewhere(place, number)
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

    with place.started("a", lambda _: slow_after(6 * (1 + number % 2), 1.0)) as first:
        wait_for(lambda: place.newest() >= 6 * (1 + number % 2) or first.processes[0].poll() is not None)
        assert first.processes[0].poll() is None, f"it exited early: {first.text[-900:]}"
        yield place, first


def _out_of_grace(setting: Setting, number: int) -> None:
    grace = 3
    with object_server() as server:
        place = Place(setting, server, f"grace-{number}")
        with place.started("a", lambda _: slow_after(6, 0.3), ["--grace-seconds", grace]) as run:
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
