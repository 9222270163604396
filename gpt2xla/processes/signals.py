"""Turns the first SIGTERM or Ctrl-C into a request to stop, and passes it on to worker processes."""

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

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Where a launcher passes Ctrl-C on, a process receives it twice; both count as one request.
_SECONDS_OF_ONE_REQUEST = 1.0


class StopSignals:
    """While active, the first SIGTERM or SIGINT requests a stop instead of ending the process.

    A second one, a second or more later, ends the process at once. Until a trainer sets `is_handled`, both signals do what
    they did before.

    Workers get the signals too. Pickled as an argument of a worker process, this object becomes a new, active one in the
    worker's main thread, which is the only thread where Python lets signals be handled."""

    def __init__(self) -> None:
        self.received: str | None = None  # name of the signal that requested the stop
        self.is_handled = False  # whether a trainer has promised to act on `received`
        self._at = -math.inf
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind and self.received and not self.is_handled:  # the signal ended workers before they began to train
            raise SystemExit(128 + signal.Signals[self.received])

    def __reduce__(self) -> tuple[Callable[[], StopSignals], tuple[()]]:
        return _in_worker, ()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        workers = multiprocessing.active_children()
        if self.received and time.monotonic() - self._at > _SECONDS_OF_ONE_REQUEST:
            for worker in workers:
                worker.kill()
            if not workers:
                os._exit(128 + number)
            self._as_before(number, frame)
        elif not (workers or self.is_handled):
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
