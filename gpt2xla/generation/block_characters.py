"""Pictures in the terminal, as they grow: each character shows two pixels, one above the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

import numpy as np

from gpt2xla.sketches.format import Picture

_BLOCKS, _ASCII = " ▀▄█", " '.:"  # no ink, ink above, ink below, both
_GAP = "  "  # between pictures side by side


def fitting(size: int, columns: int) -> int:
    """Return how many pictures of `size` pixels fit side by side into so many columns, at least one."""
    return max(1, (columns + len(_GAP)) // (size + len(_GAP)))


def characters_for(stream: TextIO) -> str:
    """Return the four characters for pictures in a stream: block characters if its encoding has them."""
    try:
        _BLOCKS.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return _ASCII
    return _BLOCKS


def lines_of(steps: Iterable[Sequence[Picture]], size: int, characters: str) -> Iterator[str]:
    """Yield each line of the pictures side by side as soon as all of them have its two rows.

    Args:
        steps: the pictures so far, (rows, size) of bool each, as `draw_rows` yields them."""
    shown = 0
    for pictures in steps:
        rows = min(len(picture) for picture in pictures)
        while shown + 1 < rows or shown < rows == size:
            yield _GAP.join(_line(picture[shown : shown + 2], characters) for picture in pictures).rstrip()
            shown += 2


def _line(rows: np.ndarray, characters: str) -> str:
    """Return one or two rows as a line."""
    above, below = rows[0], rows[1] if len(rows) > 1 else np.zeros_like(rows[0])
    return "".join(characters[number] for number in above + 2 * below)
