"""Strokes of a picture of ink: what a pen would have drawn, however thick the lines are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from PIL import Image, ImageFilter

_SIDE = 96  # pixels of the longer side in which lines are thinned
_BAND = 8  # of these: areas more than twice as wide become outlines
_STEP = 3  # of these: the distance of a stroke's points

Point = tuple[int, int]


def trace(ink: np.ndarray) -> list[np.ndarray]:
    """Return the middle lines of `ink`, a (height, width) bool array with some of it, as strokes: (n, 2) float arrays of x
    and y. Wide areas give their outline."""
    return list(_paths(thinned(_hollow(_small(ink)))))


def _small(ink: np.ndarray) -> np.ndarray:
    """Return what is around the ink, with no more than `_SIDE` pixels on the longer side. A pixel is ink where any of its
    part of the original is, so that no line is lost."""
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = min(1.0, _SIDE / max(ink.shape))
    small = np.zeros([max(1, round(side * scale)) for side in ink.shape], bool)
    row, column = np.nonzero(ink)
    small[row * small.shape[0] // ink.shape[0], column * small.shape[1] // ink.shape[1]] = True
    return small


def _hollow(ink: np.ndarray) -> np.ndarray:
    inner = Image.fromarray(np.pad(ink, _BAND).astype(np.uint8)).filter(ImageFilter.MinFilter(2 * _BAND + 1))
    return ink & ~np.asarray(inner, bool)[_BAND:-_BAND, _BAND:-_BAND]


def thinned(ink: np.ndarray) -> np.ndarray:
    """Return `ink` with all lines one pixel wide. No line is broken and none vanishes.

    Z. Guo and R. W. Hall, "Parallel thinning with two-subiteration algorithms" (1989), the first of them."""
    ink = np.pad(ink, 1)
    height, width = ink.shape
    # The eight around a pixel, clockwise from the one above, as (rows, columns) of the padded picture.
    around = [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]
    inner, is_done = ink[1:-1, 1:-1], [False, False]
    while not all(is_done):
        for turn in (0, 1):
            n, ne, e, se, s, sw, w, nw = (ink[1 + y : height - 1 + y, 1 + x : width - 1 + x] for y, x in around)
            crossings = (~n & (ne | e)) * 1 + (~e & (se | s)) + (~s & (sw | w)) + (~w & (nw | n))
            one = (nw | n) * 1 + (ne | e) + (se | s) + (sw | w)
            other = (n | ne) * 1 + (e | se) + (s | sw) + (w | nw)
            neighbours = np.minimum(one, other)
            side = ((n | ne | ~se) & e) if turn == 0 else ((s | sw | ~nw) & w)
            gone = inner & (crossings == 1) & (neighbours >= 2) & (neighbours <= 3) & ~side
            is_done[turn] = not gone.any()
            inner &= ~gone
    return inner


def _paths(lines: np.ndarray) -> Iterator[np.ndarray]:
    """Yield each line of one pixel's width between ends and crossings, as the points of a stroke."""
    points: set[Point] = {(x, y) for y, x in np.argwhere(lines).tolist()}
    joined = {point: _joined(point, points) for point in points}
    seen: set[tuple[Point, Point]] = set()
    for start in sorted(points, key=lambda point: len(joined[point]) == 2):  # closed lines last
        if not joined[start]:
            yield np.array([start], float)
        for second in joined[start]:
            path = [start, second]
            if (start, second) in seen:
                continue
            while len(joined[path[-1]]) == 2 and path[-1] != start:
                path += [point for point in joined[path[-1]] if point != path[-2]]
            seen |= {*pairwise(path), *pairwise(reversed(path))}
            yield np.array([*path[:-1:_STEP], path[-1]], float)


def _joined(point: Point, points: set[Point]) -> list[Point]:
    """Return the neighbours that a line leads to: those beside, and at a corner those that none beside leads to."""
    x, y = point
    beside = [p for p in ((x, y - 1), (x + 1, y), (x, y + 1), (x - 1, y)) if p in points]
    corners = [(x + dx, y + dy) for dx in (-1, 1) for dy in (-1, 1) if not {(x + dx, y), (x, y + dy)} & points]
    return beside + [p for p in corners if p in points]
