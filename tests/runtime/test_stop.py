"""Processes agree on the step after which they stop; one alone stops after the step it is in."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gpt2xla.config import TrainConfig
from gpt2xla.processes.signals import StopSignals
from gpt2xla.runtime.one_device import OneDevice
from gpt2xla.runtime.stop import Stop


class Late(OneDevice):
    """A device whose values the host reads `steps_behind` steps late."""

    def __init__(self, world_size: int, steps_behind: int) -> None:
        super().__init__(torch.device("cpu"), world_size=world_size)
        self.steps_behind, self.unread = steps_behind, []

    def when_ready(self, callback, values) -> None:
        self.unread.append((callback, values))

    def wait(self, behind: int = 0) -> None:
        while len(self.unread) > behind:
            callback, values = self.unread.pop(0)
            callback(*values.tolist())


def stopped_after(world_size: int, steps_behind: int, requested_in: int) -> list[int]:
    """Let the first process request a stop while step number `requested_in` is made. Return where each one stops."""
    runtimes = [Late(world_size, steps_behind) for _ in range(world_size)]
    signals = [StopSignals() for _ in runtimes]
    stops = [Stop(r, s, TrainConfig()) for r, s in zip(runtimes, signals, strict=True)]
    ends: list[int] = []
    for step in range(1, 10):
        if step == requested_in:
            signals[0].received = "SIGINT"
        requests = torch.stack([stop.requested() for stop in stops]).sum()
        for stop, runtime in zip(stops, runtimes, strict=True):
            runtime.when_ready(stop.receiver(), requests[None])
        if ends := [step for stop in stops if stop.agreed()]:
            break
    return ends


class Several(OneDevice):
    """A process of several, of which the others have `gathered`."""

    gathered: tuple[float, ...] = ()

    def gather(self, value: float) -> list[float]:
        return [value, *self.gathered]


@pytest.mark.parametrize(
    ("received", "gathered", "limit", "code", "reason"),
    [
        ("SIGTERM", (), None, 143, "SIGTERM"),
        ("SIGINT", (), None, 130, "SIGINT"),
        (None, (0, 143), None, 143, "SIGTERM"),
        (None, (130, 0), 1e-12, 130, "SIGINT"),
        ("SIGTERM", (0, 1), None, 1, "SIGTERM"),
        (None, (0,), 1e-12, 0, "--max-hours"),
        (None, (), None, 0, ""),
    ],
)
def test_all_exit_with_the_code_of_the_signal_that_one_was_sent(
    received: str | None, gathered: tuple[float, ...], limit: float | None, code: int, reason: str
) -> None:
    runtime, signals = Several(torch.device("cpu")), StopSignals()
    runtime.gathered, signals.received = gathered, received
    stop = Stop(runtime, signals, dataclasses.replace(TrainConfig(), max_hours=limit))
    stop.conclude()
    assert (stop.exit_code, stop.reason) == (code, reason)


def test_a_failed_save_is_the_reason_though_a_signal_came_too() -> None:
    signals = StopSignals()
    stop = Stop(OneDevice(torch.device("cpu")), signals, TrainConfig())
    stop.request("a checkpoint that could not be written")
    signals.received = "SIGTERM"
    stop.conclude()
    assert (stop.exit_code, stop.reason) == (1, "a checkpoint that could not be written")


@pytest.mark.parametrize("steps_behind", [0, 1, 2])
def test_all_stop_after_the_same_step_as_soon_as_they_know(steps_behind: int) -> None:
    assert stopped_after(3, steps_behind, 4) == [4 + steps_behind] * 3
    assert stopped_after(1, steps_behind, 4) == [4]


def test_the_smaller_time_limit_counts() -> None:
    def reason(**limits: float) -> str:
        return Stop(OneDevice(torch.device("cpu")), None, dataclasses.replace(TrainConfig(), **limits)).reason

    assert reason() == reason(max_hours=1.0, max_minutes=1.0) == ""
    assert reason(max_hours=1e-12, max_minutes=1.0) == reason(max_hours=1e-12) == "--max-hours"
    assert reason(max_hours=1.0, max_minutes=1e-12) == "--max-minutes"
