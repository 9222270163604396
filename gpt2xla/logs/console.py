"""What a run says while it goes on."""

from __future__ import annotations

import sys

from tqdm import tqdm


def say(text: str, error: bool = False) -> None:
    """Print a line, past a progress bar; it stays whole where other threads have something to say, too."""
    stream = sys.stderr if error else sys.stdout
    tqdm.write(text, file=stream)
    stream.flush()
