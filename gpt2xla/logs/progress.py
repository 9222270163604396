"""Shows the progress of long work that logs nothing: in the changing line of a terminal; elsewhere a line now and then."""

from __future__ import annotations

import threading
import time

from tqdm import tqdm

from gpt2xla.logs.console import LINE, say

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_REFRESHES = 1.0  # of the changing line, which appears with the first one


class Progress:
    """Shows progress while entered. Its own thread prints, so it is up to date even during a long batch, and counting costs
    no time.

    Args:
        name: names the work.
        batches: number of batches to do. If None, only the time is shown.
        shown: whether this process prints."""

    def __init__(self, name: str, batches: int | None, shown: bool) -> None:
        self._name, self._batches = name, batches
        self._done = 0
        self._started = self._first_done = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True) if shown else None

    def __enter__(self) -> Progress:
        self._started = time.time()
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()

    def advance(self) -> None:
        """Count a batch that is done, not only handed to the device. Only one thread at a time may call this."""
        self._done += 1
        self._first_done = self._first_done or time.time()

    def forms(self) -> tuple[str, ...]:
        """Return what there is to say, from the longest form to the shortest."""
        elapsed = tqdm.format_interval(time.time() - self._started)
        if self._batches is None:
            return (f"{self._name}: {elapsed} so far", elapsed)
        # The first batch may include a compilation, so it says nothing about the others.
        rate = (self._done - 1) / (time.time() - self._first_done) if self._done > 1 else 0
        left = f", {tqdm.format_interval((self._batches - self._done) / rate)} left" if rate else ""
        done = f"{self._done}/{self._batches}"
        text = f"{self._name}: {done} {'batch' if self._batches == 1 else 'batches'} after {elapsed}"
        return (text + left, text, f"{self._name}: {done}", done)

    def _show(self) -> None:
        if not LINE.is_possible:
            while not self._ended.wait(_SECONDS_BETWEEN_LINES):
                say(self.forms()[0], error=True)
            return
        before = LINE.forms
        while not self._ended.wait(_SECONDS_BETWEEN_REFRESHES):
            LINE.show(self.forms())
        LINE.clear()
        if before:
            LINE.show(before)
