"""Lets all processes of a run stop after the same step: on a signal, after --max-hours, or when their launcher has ended."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

from torch import Tensor

from gpt2xla.processes.signals import StopSignals
from gpt2xla.runtime.base import Runtime

# The results of the last steps may still be on the device. Waiting for them would leave it without work.
_STEPS_BEHIND = 2


class Stopped(Exception):
    """All processes have agreed to stop, in the middle of an evaluation."""


class Stop:
    """Agreement between processes that each have their own signals and their own clock.

    With every step, the devices sum the number of processes that request a stop. All processes read the same sums, a few
    steps later, and so decide alike. `signals` is None where they are not handled, as in a notebook. The run stops
    after `hours`, or never if that is None."""

    def __init__(self, runtime: Runtime, signals: StopSignals | None, hours: float | None) -> None:
        self.runtime, self.signals = runtime, signals
        self._deadline = math.inf if hours is None else time.monotonic() + hours * 3600
        self._requested_reason = ""
        # torchrun ends its workers before itself, unless it is killed. Then nothing else would end them.
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._steps = 0
        self._first_request: float = math.inf
        if signals:
            signals.is_handled = True

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
        self.runtime.wait(behind=_STEPS_BEHIND)
        return self._first_request <= self._steps - _STEPS_BEHIND

    def request(self, reason: str) -> None:
        """Request a stop for this process's own `reason`."""
        self._requested_reason = reason

    @property
    def reason(self) -> str:
        """Why this process requests a stop; empty if it does not."""
        if self._requested_reason:
            return self._requested_reason
        if self.signals and self.signals.received:
            return self.signals.received
        if self._torchrun is not None and os.getppid() != self._torchrun:
            return "the end of torchrun"
        return "--max-hours" if time.monotonic() > self._deadline else ""
