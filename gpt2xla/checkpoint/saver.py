"""Saves in the background: training waits for the copy of its state to host memory, and not for the disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundSaves:
    """Writes in a thread, one save at a time.

    Args:
        failed: told, in that thread, of a save that could not be written.
    """

    def __init__(self, failed: Callable[[OSError], None]) -> None:
        self._failed = failed
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        self._last: Future[bool] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Have `write` called; first wait for the one before. Raises what it raised, if that was not OSError."""
        self.wait()
        self._last = self._thread.submit(self._write, write)

    def wait(self) -> bool:
        """Until nothing is being written: whether the last save is on the disk."""
        return self._last is None or self._last.result()

    def _write(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except OSError as error:
            self._failed(error)
            return False
        return True
