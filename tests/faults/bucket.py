"""Runs whose checkpoints go to an object store: SIGKILL at each of its calls, and a store that is busy, slow or refuses."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial

from tests.faults import comparing, runs
from tests.faults.bucket_place import EXACT, STEPS, WRITES, Place, in_step, kill_somewhere, short, wait_for
from tests.faults.cases import Row, Setting, check_all
from tests.object_server import ObjectServer, object_server


def killed(setting: Setting) -> list[Row]:
    setting, rows = short(setting), []
    for kind, every, name in (("s3", 1, "S3"), ("gs", 3, "GCS")):
        with object_server(kind) as server:
            calls = _calls(setting, server)
            row = Row(
                f"SIGKILL at each call that writes to the bucket, before or after it is carried out, {name}", EXACT
            )
            cases = [(call, before) for call in range(calls) for before in (True, False)]
            cases = cases[:: every if setting.full else len(cases) // 4 | 1]  # odd: both before and after
            rows.append(check_all(row, cases, partial(_killed_at, setting, server)))
            share = "" if every == 1 else "; every third case"
            row.notes.append(f"{calls} calls that write, in a run of {STEPS} steps with 4 checkpoints{share}")
    return rows


def killed_again(setting: Setting) -> list[Row]:
    setting = short(setting)
    with object_server() as server:
        row = Row("SIGKILL at calls at random, again and again, on new machines and on the same one", EXACT)
        cases = [(number, 1 + number % 4 // 3) for number in range(setting.cases(20, 2))]
        return [check_all(row, cases, partial(_killed_again_and_again, setting, server))]


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
    while kills < setting.cases(5, 2):
        call, before = draw.randrange(40), draw.random() < 0.5
        machine = draw.choice(("same", f"machine-{start}"))
        start += 1

        def prepare(_: int, call: int = call, before: bool = before) -> None:
            server.kill(os.getpid(), before, skip=call, key=f"{place.name}/*")

        with place.started(machine, prepare, world=world) as run:
            code = run.processes[0].wait()
            assert code in (-signal.SIGKILL, 0), f"exit code {code}: {run.text[-900:]}"
            kills += code == -signal.SIGKILL
        server.clear(f"{place.name}/*")
        if code == 0:
            break
    place.finish("last", world)
    place.check(world)
    assert kills, "it was never killed"
    return kills


# A store that fails ----------------------------------------------------------------------------------------------------


def failing(setting: Setting) -> list[Row]:
    setting = short(setting)
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
            kill_somewhere(place, number)
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
        assert "the newest checkpoint in" in errors[0] or "no checkpoint is in" in errors[0], text[-900:]
        newest = place.newest()
        assert newest < STEPS, "it was sent"
        assert max(comparing.losses(next(place.scratch("a").iterdir()))) == STEPS, "training did not continue"
        server.renew_credentials()
        text = place.finish("a")
        assert "nothing to do" in text, text[-900:]
        place.check()
