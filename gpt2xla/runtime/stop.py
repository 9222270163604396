"""Lets all processes of a run stop after the same step: on a signal, at a time limit, or when their launcher has ended."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable

from torch import Tensor

from gpt2xla.config import TrainConfig
from gpt2xla.processes.signals import StopSignals
from gpt2xla.runtime.base import Runtime


class Stopped(Exception):
    """All processes have agreed to stop, in the middle of an evaluation."""


class Stop:
    """Agreement between processes that each have their own signals and their own clock.

    With every step, the devices sum the number of processes that request a stop. All processes read the same sums,
    `runtime.steps_behind` steps later, and so decide alike. A process that is alone decides after each step: it waits only
    for steps that are queued on its device.

    Args:
        signals: None where they are not handled, as in a notebook.
        train: its time limits count from now.
        newest: returns which checkpoint is the newest, in words, for a run that is ended at once.

    `exit_code` is that of a run that stops before its end, once all processes have called `conclude`: 1 if one of them could
    not continue, 128 and the number of the signal that one was sent, or 0 if the user has asked for this end, with a time
    limit."""

    def __init__(
        self, runtime: Runtime, signals: StopSignals | None, train: TrainConfig, newest: Callable[[], str] = str
    ) -> None:
        self.runtime, self.signals = runtime, signals
        limits = {"--max-hours": (train.max_hours, 3600), "--max-minutes": (train.max_minutes, 60)}
        seconds = {name: math.inf if limit is None else limit * unit for name, (limit, unit) in limits.items()}
        self._limit = min(seconds, key=lambda name: seconds[name])
        self._deadline = time.monotonic() + seconds[self._limit]
        self._requested_reason = ""
        self.exit_code = 0
        # torchrun ends its workers before itself, unless it is killed. Then nothing else would end them.
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._steps = 0
        self._first_request: float = math.inf
        self.newest = newest
        if signals:
            signals.handle("the steps under way" if runtime.steps_behind else "this step", lambda: self.newest())

    def requested(self) -> Tensor:
        """Return 1.0 on the device if this process requests a stop, else 0.0.

        Every process calls it inside each step of training or evaluation, and sends the sum of all to `receiver`."""
        self._steps += 1
        return self.runtime.flag(self.reason != "")

    def receiver(self) -> Callable[[float], None]:
        """Return, inside the same step, the function that receives the number of requests once the device has it."""
        step = self._steps

        def receive(requests: float) -> None:
            if requests:
                self._first_request = min(self._first_request, step)

        return receive

    @property
    def seconds_left(self) -> float:
        """To the time limit; infinite if there is none."""
        return self._deadline - time.monotonic()

    def agreed(self) -> bool:
        """Tell, after a step, whether all processes stop here."""
        if self.signals:
            self.signals.end_step()
        behind = self.runtime.steps_behind
        self.runtime.wait(behind=behind)
        if self.runtime.world_size == 1:
            return self.reason != ""
        return self._first_request <= self._steps - behind

    def request(self, reason: str) -> None:
        """Request a stop because this process cannot continue, for that `reason`."""
        self._requested_reason = reason

    def conclude(self) -> None:
        """Agree, at the end of a run, on `exit_code`. Collective.

        Where torchrun is well, that stays 0: it would report any other code as a failure and might start the run again, and
        a signal that it was sent itself makes its own code."""
        own = self._exit_code
        codes = {int(code) for code in self.runtime.gather(own)}
        code = 1 if 1 in codes else max(codes)
        if code > 1 and not own:
            self._requested_reason = signal.Signals(code - 128).name
        if code <= 1 or self._torchrun is None or self._torchrun_has_ended:
            self.exit_code = code

    def seconds_of_grace(self, grace: float) -> float | None:
        """Return what is left of `grace` seconds since SIGTERM, after which a machine may be gone; None without SIGTERM."""
        if self.signals is None or self.signals.received != "SIGTERM":
            return None
        return grace - (time.monotonic() - self.signals.received_at)

    def begin_save(self) -> None:
        """Note that a save begins: one more signal does not end the run before `end_save`."""
        if self.signals:
            self.signals.begin_save()

    def end_save(self) -> None:
        if self.signals:
            self.signals.end_save()

    @property
    def reason(self) -> str:
        """Why this process requests a stop; empty if it does not."""
        if self._requested_reason:
            return self._requested_reason
        if self.signals and self.signals.received:
            return self.signals.received
        if self._torchrun_has_ended:
            return "the end of torchrun"
        return self._limit if time.monotonic() > self._deadline else ""

    @property
    def _exit_code(self) -> int:
        """By this process's own reason. The end of torchrun counts as SIGTERM."""
        if self._requested_reason:
            return 1
        if self.signals and self.signals.received:
            return 128 + signal.Signals[self.signals.received]
        return 128 + signal.SIGTERM if self._torchrun_has_ended else 0

    @property
    def _torchrun_has_ended(self) -> bool:
        return self._torchrun is not None and os.getppid() != self._torchrun
