"""Copies of drawings as another hand might have drawn them: turned, sheared, stretched, smaller and shifted a little."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gpt2xla.data.preparation.chance import uniform_for
from gpt2xla.sketches.strokes import Drawings

# The most of each, in either direction; a copy's are drawn uniformly.
_TURN = 0.25  # radians
_SHEAR = 0.2
_STRETCH = 0.18  # of the logarithm of width by height
_SMALLER = 0.2  # of the size, which only shrinks
_SHIFT = 2 / 24  # of the picture


class Altered(NamedTuple):
    """Altered drawings, with the scale (N,) and shift (N, 2) in pixels that `rasterise_all` takes."""

    drawings: Drawings
    scale: np.ndarray
    shift: np.ndarray


def altered(drawings: Drawings, numbers: np.ndarray, size: int) -> Altered:
    """Return a copy of each drawing for pictures of `size`. `numbers`, (N,) of uint64, decide how it differs."""
    turn, shear, stretch, smaller, right, down = (uniform_for(numbers, draw) for draw in range(1, 7))
    angle, skew, wider = (
        (2 * drawn - 1) * most for drawn, most in ((turn, _TURN), (shear, _SHEAR), (stretch, _STRETCH))
    )
    cos, sin, wide, high = np.cos(angle), np.sin(angle), np.exp(wider / 2), np.exp(-wider / 2)
    # rotation @ [[1, skew], [0, 1]] @ diagonal(wide, high)
    matrix = np.array([[cos * wide, (cos * skew - sin) * high], [sin * wide, (sin * skew + cos) * high]])
    points = (np.repeat(matrix, drawings.point_counts, axis=2) * drawings.points).sum(axis=1)
    shift = (2 * np.stack([right, down], axis=1) - 1) * _SHIFT * size
    return Altered(drawings._replace(points=points), 1 - _SMALLER * smaller, shift)
