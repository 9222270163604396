"""What a run prints: lines that stay, and on a terminal one line below them that changes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_TEXTS = 0.1


def say(text: str, error: bool = False) -> None:
    """Print a line without breaking the changing line, or lines that other threads print."""
    stream = sys.stderr if error else sys.stdout
    tqdm.write(text, file=stream)
    stream.flush()


class ChangingLine:
    """The line of a terminal that shows what is going on now. There is only one, whoever shows something in it: two lines
    would need to move the cursor up, which the output of a notebook's cell cannot."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stream: TextIO | None = None
        self._last_shown = 0.0
        self.forms: tuple[str, ...] = ()  # what it is to show now

    @property
    def is_possible(self) -> bool:
        return sys.stderr.isatty()

    def show(self, forms: Iterable[str]) -> None:
        """Show the first of `forms` that fits the terminal, from the longest to the shortest; nothing if none fits.

        A text that follows the last one at once is left out."""
        self.forms = tuple(forms)
        with tqdm.get_lock():
            if self._bar is None or self._stream is not sys.stderr:
                self._stream, self._last_shown = sys.stderr, 0.0
                self._bar = tqdm(bar_format="{desc}", leave=False, file=sys.stderr)
            if time.monotonic() - self._last_shown >= _SECONDS_BETWEEN_TEXTS:
                self._last_shown = time.monotonic()
                self._bar.set_description_str(first_fitting(self.forms, columns() - 1))

    def clear(self) -> str:
        """Remove the line, and return what it is to show."""
        with tqdm.get_lock():
            if self._bar is not None:
                self._bar.close()
            text, self.forms, self._bar = first_fitting(self.forms, columns() - 1), (), None
        return text


LINE = ChangingLine()


def columns() -> int:
    """Return the width of the terminal; 80 where that is unknown."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):  # not a terminal, or not a file
        return 80


def first_fitting(forms: Iterable[str], width: int) -> str:
    """Return the first text of at most `width` characters; "" if all are longer."""
    return next((text for text in forms if len(text) <= width), "")
