"""Prints lines during a run, past a progress bar."""

from __future__ import annotations

import sys

from tqdm import tqdm


def say(text: str, error: bool = False) -> None:
    """Print a line without breaking a progress bar, or lines that other threads print."""
    stream = sys.stderr if error else sys.stdout
    tqdm.write(text, file=stream)
    stream.flush()
