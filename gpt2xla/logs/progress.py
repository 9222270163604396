"""Shows the progress of long work that logs nothing: a bar on a terminal; elsewhere a line of text now and then."""

from __future__ import annotations

import sys
import threading
import time

from tqdm import tqdm

from gpt2xla.logs.console import say

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_REFRESHES = 1.0  # of the bar, which appears with the first one


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

    def __str__(self) -> str:
        elapsed = tqdm.format_interval(time.time() - self._started)
        if self._batches is None:
            return f"{self._name}: {elapsed} so far"
        # The first batch may include a compilation, so it says nothing about the others.
        rate = (self._done - 1) / (time.time() - self._first_done) if self._done > 1 else 0
        left = f", {tqdm.format_interval((self._batches - self._done) / rate)} left" if rate else ""
        return f"{self._name}: {self._done}/{self._batches} batches after {elapsed}{left}"

    def _show(self) -> None:
        if not sys.stderr.isatty():
            while not self._ended.wait(_SECONDS_BETWEEN_LINES):
                say(str(self), error=True)
            return
        layout = "{desc}" if self._batches is None else "{desc} |{bar}|"
        bar: tqdm | None = None
        while not self._ended.wait(_SECONDS_BETWEEN_REFRESHES):
            if bar is None:
                bar = tqdm(desc=str(self), total=self._batches, bar_format=layout, leave=False, dynamic_ncols=True)
            bar.n = self._done
            bar.set_description_str(str(self))
        if bar is not None:
            bar.close()
