"""Stopping before the last step: on SIGTERM, on Ctrl-C, after --max-hours, at the launcher's end, and all processes of a run
at the same step."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor

from gpt2xla.runtime.base import Runtime

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Ctrl-C reaches a process twice where a launcher passes it on, and that is one wish.
_SECONDS_OF_ONE_WISH = 1.0
# The answers of the last steps may still be on the device; whoever waited for them would leave it without work.
_STEPS_BEHIND = 2


class StopSignals:
    """While entered, SIGTERM and SIGINT are a wish instead of an end, once a trainer heeds it: the first is noted, and
    another, a second or more later, ends the process at once. As long as nobody heeds them they do what they did before.

    Signals are passed on to worker processes. Given to one as an argument, this is made and entered anew there, in its main
    thread, the only one where Python lets signals be handled.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.heeded = False
        self._at = -math.inf
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind and self.received and not self.heeded:  # it ended workers that had not begun to train
            raise SystemExit(128 + signal.Signals[self.received])

    def __reduce__(self) -> tuple[Callable[[], StopSignals], tuple[()]]:
        return _in_worker, ()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        workers = multiprocessing.active_children()
        if self.received and time.monotonic() - self._at > _SECONDS_OF_ONE_WISH:
            for worker in workers:
                worker.kill()
            if not workers:
                os._exit(128 + number)
            self._as_before(number, frame)
        elif not (workers or self.heeded):
            self._as_before(number, frame)
        elif not self.received:
            self.received, self._at = signal.Signals(number).name, time.monotonic()
            for worker in workers:
                worker.terminate()

    def _as_before(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, before)
            os.kill(os.getpid(), number)


def _in_worker() -> StopSignals:
    return StopSignals().__enter__()


class Stopped(Exception):
    """All processes have agreed to stop, in the middle of an evaluation."""


class Stop:
    """How all processes come to stop at the same step, though each has signals and a clock of its own: with every step
    the number of those that wish to is added up on the devices, and what is known of it some steps later decides.

    Args:
        signals: None where nobody listens for them, as in a notebook.
        hours: after which to stop; None for never.
    """

    def __init__(self, runtime: Runtime, signals: StopSignals | None, hours: float | None) -> None:
        self.runtime, self.signals = runtime, signals
        self._deadline = math.inf if hours is None else time.monotonic() + hours * 3600
        self._own_wish = ""
        # torchrun ends its workers before itself, unless it is killed: they would train on with nobody to end them.
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._asked = 0
        self._first_wish: float = math.inf
        if signals:
            signals.heeded = True

    def ask(self) -> Tensor:
        """Inside a step of training or evaluation, the same on all processes: 1 on the device if this one wishes to stop,
        else 0. What all processes' come to is for `hearer`."""
        self._asked += 1
        return self.runtime.flag(self.reason != "")

    def hearer(self) -> Callable[[float], None]:
        """Inside the same step: what receives the number once the device has it."""
        number = self._asked

        def hear(wishes: float) -> None:
            if wishes:
                self._first_wish = min(self._first_wish, number)

        return hear

    def agreed(self) -> bool:
        """After a step: whether all processes stop here."""
        self.runtime.wait(behind=_STEPS_BEHIND)
        return self._first_wish <= self._asked - _STEPS_BEHIND

    def wish(self, reason: str) -> None:
        """This process wishes to stop for a reason of its own."""
        self._own_wish = reason

    @property
    def reason(self) -> str:
        """Why this process wished to stop."""
        signal_name = self.signals.received if self.signals else None
        is_orphaned = self._torchrun is not None and os.getppid() != self._torchrun
        return (
            self._own_wish
            or signal_name
            or ("the end of torchrun" if is_orphaned else "")
            or ("--max-hours" if time.monotonic() > self._deadline else "")
        )
