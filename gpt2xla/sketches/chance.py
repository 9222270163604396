"""Chance that depends on numbers of 64 bits only, such as a drawing's key, so not on order or number of workers."""

from __future__ import annotations

import numpy as np

from gpt2xla.data.preparation.splitting import STEP, mixed


def drawn(numbers: np.ndarray, draw: int) -> np.ndarray:
    """Return another number for each of `numbers`, (N,) of uint64. Different draws have nothing to do with each other."""
    return mixed(numbers + np.uint64(draw * STEP % 2**64))


def uniform(numbers: np.ndarray, draw: int) -> np.ndarray:
    """Return what is `drawn` as numbers in [0, 1), (N,) of float64."""
    return drawn(numbers, draw) / 2.0**64
