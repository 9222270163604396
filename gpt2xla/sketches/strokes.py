"""Drawings as strokes of a pen, and these as small pictures without grey: uniformly scaled, centred, drawn by Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

LEAST_EXTENT = 1e-3  # of a drawing with a shape; a smaller one becomes a dot
MOST_COORDINATE = 1e6


class Drawings(NamedTuple):
    """N drawings of S strokes with P points in all. Each drawing has a stroke, and each stroke a point.

    Attributes:
        points: (2, P), float64: x to the right, then y downwards. They are finite, at most MOST_COORDINATE from 0.
        strokes: (S,), the number of points of each stroke.
        drawings: (N,), the number of strokes of each drawing.
    """

    points: np.ndarray
    strokes: np.ndarray
    drawings: np.ndarray

    @property
    def point_counts(self) -> np.ndarray:
        """The number of points of each drawing, (N,)."""
        return np.add.reduceat(self.strokes, starts_of(self.drawings))

    def only(self, chosen: np.ndarray) -> Drawings:
        """Return the drawings that are `chosen`, (N,) of bool."""
        strokes = np.repeat(chosen, self.drawings)
        return Drawings(self.points[:, np.repeat(strokes, self.strokes)], self.strokes[strokes], self.drawings[chosen])


def rasterise(strokes: Sequence[np.ndarray], size: int = 24, stroke_width: int = 1) -> np.ndarray:
    """Return one drawing as a picture: (size, size), bool, True is ink. It is the picture that `rasterise_all` makes.

    `strokes` hold (n, 2) numbers each: x to the right, y downwards, in any unit. Those without a point do not count; without
    any point the picture is empty. Raises ValueError for other shapes, and coordinates that are not finite or absurd.
    """
    held = [np.asarray(stroke, dtype=np.float64) for stroke in strokes if len(stroke)]
    if not held:
        return np.zeros((size, size), dtype=np.bool_)
    if any(stroke.ndim != 2 or stroke.shape[1] != 2 for stroke in held):
        raise ValueError("each stroke must hold pairs of x and y")
    points = np.concatenate(held)
    if not (np.abs(points) <= MOST_COORDINATE).all():
        raise ValueError(f"coordinates must be numbers, at most {MOST_COORDINATE:,.0f} from 0")
    drawings = Drawings(points.T, np.array([len(stroke) for stroke in held]), np.array([len(held)]))
    return rasterise_all(drawings, size, stroke_width)[0]


def rasterise_all(
    drawings: Drawings,
    size: int = 24,
    stroke_width: int = 1,
    *,
    scale: np.ndarray | float = 1.0,
    shift: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Return drawings as pictures: (N, size, size), bool, True is ink.

    The longer side of a drawing fills the picture, times `scale`: (N,), above 0, at most 1. The drawing stands in the middle
    plus `shift`, (N, 2) in pixels, as far as all of it stays inside. A pen of stroke_width x stroke_width pixels follows the
    lines of Bresenham between the points, each rounded to the nearest pixel."""
    points, strokes, _ = drawings
    counts = drawings.point_counts
    starts, of = starts_of(counts), np.repeat(np.arange(len(counts)), counts)
    least = np.minimum.reduceat(points, starts, axis=1)
    extent = np.maximum.reduceat(points, starts, axis=1) - least
    longest, steps = extent.max(axis=0), size - stroke_width
    pixels = np.where(longest < LEAST_EXTENT, 0.0, steps * scale / np.maximum(longest, LEAST_EXTENT))
    room = (steps - extent * pixels) / 2
    offset = room + np.clip(np.transpose(shift), -room, room) + 0.5
    x, y = ((points - least[:, of]) * pixels[of] + offset[:, of]).astype(np.int32)
    y += (of * size).astype(np.int32)  # one below the other: drawn on one canvas
    moves = np.ones(len(x), dtype=np.bool_)  # or a point lies in the pixel of the one before
    moves[1:] = (x[1:] != x[:-1]) | (y[1:] != y[:-1])
    moves[starts_of(strokes)] = True
    ends = np.cumsum(moves)[np.cumsum(strokes) - 1]
    pictures = _drawn(x[moves], y[moves], ends, size, len(counts))
    for _ in range(stroke_width - 1):
        pictures[:, 1:] |= pictures[:, :-1].copy()
        pictures[:, :, 1:] |= pictures[:, :, :-1].copy()
    return pictures


def starts_of(counts: np.ndarray) -> np.ndarray:
    """Return where each group begins, if groups of these sizes lie one after the other."""
    return np.cumsum(counts) - counts


def _drawn(x: np.ndarray, y: np.ndarray, ends: np.ndarray, size: int, count: int) -> np.ndarray:
    """Return `count` pictures with lines through pixels, (P,) each, of strokes that end before each of `ends`."""
    canvas = Image.new("L", (size, size * count))
    line, flat, start = ImageDraw.Draw(canvas).line, np.stack([x, y], axis=1).ravel().tolist(), 0
    for end in (2 * ends).tolist():
        line(flat[start:end], fill=1)
        start = end
    ink = np.array(canvas, dtype=np.bool_)
    ink[y, x] = True  # Pillow leaves out strokes of one point
    return ink.reshape(count, size, size)
