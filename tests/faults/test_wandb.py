"""A wandb that is unreachable, hangs, dies or is slow never disturbs a run; each step is sent once, under one id.

No network: `FakeWandb` keeps rows as wandb's server does. A past step takes no more values, and a resumed run begins after
the last step that arrived.
"""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_RUN, training_losses

from gpt2xla.config import RunConfig
from gpt2xla.logs import background_sink
from gpt2xla.logs.wandb_sink import WANDB_FILE, WandbSink


class FakeWandb(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}  # by id and step
        self.calls: list[tuple[str, int, dict[str, Any]]] = []
        self.offline = False
        self.started: list[dict[str, Any]] = []
        self.on_init: Callable[[], None] = lambda: None
        self.on_log: Callable[[int], None] = lambda step: None

    class Settings(types.SimpleNamespace):
        pass

    def init(self, **settings: Any) -> FakeRun:
        self.on_init()
        self.started.append(settings)
        return FakeRun(self, settings["id"])


class FakeRun:
    def __init__(self, wandb: FakeWandb, id: str) -> None:
        self.wandb, self.id, self.offline = wandb, id, wandb.offline
        self.rows = wandb.rows.setdefault(id, {})
        self.step = 0 if self.offline else max(self.rows, default=-1) + 1

    def log(self, values: dict[str, Any], step: int) -> None:
        self.wandb.on_log(step)
        if step < self.step:
            raise AssertionError(f"step {step} is sent again; the run is at {self.step}")
        self.step = step
        self.wandb.calls.append((self.id, step, values))
        row = self.rows.setdefault(step, {})
        assert not values.keys() & row.keys() - {"tokens"}, f"sent twice for step {step}: {values}"
        row.update(values)

    def finish(self) -> None:
        pass


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    yield fake
    for thread in threading.enumerate():
        if thread.name == "wandb":
            thread.join(10)


def sink(folder: Path, run_id: str | None = None, **options: Any) -> WandbSink:
    return WandbSink(RunConfig.from_flat({"wandb_logging_interval": 1} | options), folder, run_id)


def trained(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "loss": 5.0 - step / 100}


def validated(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "valid_loss": 6.0 - step / 100}


def write(sink: WandbSink, *lines: dict[str, Any]) -> None:
    for line in lines:
        sink.write(line)
    sink.close()


def steps_of(wandb: FakeWandb, name: str) -> list[int]:
    return [step for _, step, values in wandb.calls if name in values]


def fails(message: str) -> Callable[..., None]:
    def call(*arguments: object) -> None:
        raise RuntimeError(message)

    return call


def test_evaluations_share_the_row_of_their_step(wandb: FakeWandb, tmp_path: Path) -> None:
    write(sink(tmp_path), trained(1), trained(2), validated(2), trained(3))
    (rows,) = wandb.rows.values()
    assert rows == {
        1: {"tokens": 10, "loss": 4.99},
        2: {"tokens": 20, "loss": 4.98, "valid_loss": 5.98},
        3: {"tokens": 30, "loss": 4.97},
    }


def test_an_unreachable_server_is_reported_once(
    wandb: FakeWandb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.on_init = fails("the server refuses\nand explains at length")
    write(sink(tmp_path), *map(trained, range(1, 50)))
    error = capsys.readouterr().err
    assert error.count("wandb failed (the server refuses)") == 1
    assert error.count("\n") == 1


def test_dying_in_the_middle_is_reported_once(
    wandb: FakeWandb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.on_log = lambda step: fails("gone")() if step == 3 else None
    write(sink(tmp_path), *map(trained, range(1, 50)))
    assert steps_of(wandb, "loss") == [1, 2]
    assert capsys.readouterr().err.count("wandb failed (gone)") == 1


def test_no_line_waits_for_a_slow_one(wandb: FakeWandb, tmp_path: Path) -> None:
    released = threading.Event()
    wandb.on_log = lambda step: None if released.wait(60) else fails("never released")()
    slow = sink(tmp_path)
    for step in range(1, 200):
        slow.write(trained(step))  # returns, while the first is being sent
    assert wandb.calls == []
    released.set()
    slow.close()
    assert steps_of(wandb, "loss") == list(range(1, 200))


@pytest.mark.parametrize("place", ["on_init", "on_log"])
def test_hanging_is_given_up_at_the_end(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    monkeypatch.setattr(background_sink, "SECONDS_TO_CLOSE", 0.2)
    end = threading.Event()
    setattr(wandb, place, lambda *step: end.wait(60))
    write(sink(tmp_path), *map(trained, range(1, 5)))
    assert capsys.readouterr().err.count("wandb failed (no answer within 0.2 seconds of the run's end)") == 1
    end.set()


def test_what_waits_is_bounded(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(background_sink, "_MOST_WAITING", 5)
    end = threading.Event()
    wandb.on_init = lambda: end.wait(60)
    write(sink(tmp_path), *map(trained, range(1, 50)))
    assert capsys.readouterr().err.count("wandb failed (5 lines wait for it)") == 1
    end.set()


@pytest.mark.parametrize("offline", [False, True], ids=["server", "offline"])
@pytest.mark.parametrize("checkpoint", [0, 5])
def test_a_killed_run_resumes_under_its_id_and_sends_no_step_twice(
    wandb: FakeWandb, tmp_path: Path, checkpoint: int, offline: bool
) -> None:
    wandb.offline = offline
    write(sink(tmp_path), *map(trained, range(1, 6)), validated(5), trained(6), trained(7))  # here it was killed
    (first,) = wandb.rows
    again = sink(tmp_path, first if checkpoint else None)
    write(again, *map(trained, range(checkpoint + 1, 11)), validated(10))
    assert again.run_id == first
    assert steps_of(wandb, "loss") == list(range(1, 11))
    assert steps_of(wandb, "valid_loss") == [5, 10]
    assert [settings["resume"] for settings in wandb.started] == [None, "allow"]


def test_a_run_killed_after_an_evaluation_does_not_repeat_it_at_a_later_step(wandb: FakeWandb, tmp_path: Path) -> None:
    write(sink(tmp_path), *map(trained, range(1, 13)), validated(12))
    write(sink(tmp_path), trained(11), trained(12), validated(12), trained(13))
    assert steps_of(wandb, "valid_loss") == [12]
    assert steps_of(wandb, "loss") == list(range(1, 14))


def test_the_id_outlives_a_run_to_which_wandb_never_answered(wandb: FakeWandb, tmp_path: Path) -> None:
    wandb.on_init = fails("unreachable")
    dead = sink(tmp_path)
    write(dead, trained(1))
    wandb.on_init = lambda: None
    write(sink(tmp_path), trained(1), trained(2))
    assert list(wandb.rows) == [dead.run_id]


@pytest.mark.parametrize("offline", [False, True], ids=["server", "offline"])
@pytest.mark.parametrize("sent", [[], [validated(2)]], ids=["cut short", "complete"])
def test_repeated_evaluations_come_with_the_next_step(
    wandb: FakeWandb, tmp_path: Path, sent: list[dict[str, Any]], offline: bool
) -> None:
    """A run that ended before its checkpoint was complete repeats the evaluations of its last step, with the same result."""
    wandb.offline = offline
    write(sink(tmp_path), trained(1), trained(2), *sent)
    write(sink(tmp_path), validated(2), trained(3))
    (rows,) = wandb.rows.values()
    assert rows[3]["valid_loss"] == 5.98
    assert rows[3]["tokens"] == 30
    assert steps_of(wandb, "loss") == [1, 2, 3]


def test_which_id_is_used(wandb: FakeWandb, tmp_path: Path) -> None:
    write(sink(tmp_path, "of-the-checkpoint"), trained(1))
    write(sink(tmp_path, "of-the-checkpoint", wandb_resume_id="asked"), trained(2))
    write(sink(tmp_path, "of-the-checkpoint"), trained(3))
    assert [settings["id"] for settings in wandb.started] == ["of-the-checkpoint", "asked", "asked"]
    write(sink(tmp_path, resume="never"), trained(1))
    assert wandb.started[-1]["id"] not in ("asked", "of-the-checkpoint")
    assert wandb.started[-1]["resume"] is None


def test_a_test_is_a_separate_run(wandb: FakeWandb, tmp_path: Path) -> None:
    write(sink(tmp_path), trained(1), trained(2))
    kept = (tmp_path / WANDB_FILE).read_text()
    write(sink(tmp_path, do_test=True), validated(2))
    assert len(wandb.rows) == 2
    assert (tmp_path / WANDB_FILE).read_text() == kept


@pytest.mark.parametrize(
    "text", ["", "[", "[]", '{"id": 5, "step": 2}', '{"id": "x", "step": "2"}', "[" * 100_000, "\0"]
)
def test_a_damaged_record_of_the_id_counts_as_none(wandb: FakeWandb, tmp_path: Path, text: str) -> None:
    (tmp_path / WANDB_FILE).write_text(text)
    write(sink(tmp_path, "of-the-checkpoint"), trained(1))
    assert json.loads((tmp_path / WANDB_FILE).read_text()) == {"id": "of-the-checkpoint", "step": 1}


def test_a_run_whose_wandb_hangs_is_whole(
    wandb: FakeWandb, data_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import run_pretrain

    monkeypatch.setattr(background_sink, "SECONDS_TO_CLOSE", 0.2)
    end = threading.Event()
    wandb.on_log = lambda step: end.wait(60)
    flags = ["--checkpoints-dir", str(tmp_path / "c"), "--wandb-logging", "--wandb-logging-interval", "1"]
    monkeypatch.setattr(sys, "argv", ["run_pretrain.py", *data_flags, *SMALL_RUN, *flags])
    run_pretrain.main()
    end.set()
    assert len(training_losses(tmp_path / "c")) == 20
    assert (tmp_path / "c" / "step-00000020" / "COMPLETE").exists()
