"""A sink that works in a thread of its own. A slow, hanging or dead receiver never delays a training step, and delays the
end of a run only for a limited time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from gpt2xla.errors import in_one_line
from gpt2xla.logs.console import say

SECONDS_TO_CLOSE = 30  # preempted machines often leave a process that long
_MOST_WAITING = 100_000  # lines, each of about half a kilobyte


class BackgroundSink:
    """Queues lines for `_send`, which runs in the thread. If it raises, this is reported once, nothing more is sent, and the
    run continues. A subclass calls `_start` once it is ready.

    Args:
        name: of the receiver, for messages and the thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_dead, self._failing = False, threading.Lock()
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def write(self, line: dict[str, Any] | None) -> None:
        """Queue the line and return at once. None ends the thread."""
        if self._is_dead:
            return
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._fail(f"{_MOST_WAITING:,} lines wait for it")

    def close(self) -> None:
        """Wait until everything is received, or until the time limit."""
        self.write(None)
        if not self._is_dead:
            self._thread.join(SECONDS_TO_CLOSE)
        if self._thread.is_alive():
            self._fail(f"no answer within {SECONDS_TO_CLOSE} seconds of the run's end")

    def _start(self) -> None:
        self._thread.start()

    def _send(self) -> None:
        """Send all of `_lines`. This runs in the thread."""
        raise NotImplementedError

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines as they come, until the run ends or the sink has failed."""
        while (line := self._queue.get()) is not None and not self._is_dead:
            yield line

    def _work(self) -> None:
        try:
            self._send()
        except Exception as error:  # wandb raises its own errors, and those of requests and protobuf
            self._fail(in_one_line(error))

    def _fail(self, reason: str) -> None:
        with self._failing:  # `close` returns once this is reported
            if not self._is_dead:
                self._is_dead = True
                say(f"{self._name} failed ({reason}); the run continues, and metrics.jsonl has everything", error=True)
