"""Numbers that seem drawn at random, but depend on a seed or key and a number only: the same in any order, on any machine.

They are those of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import hashlib

import numpy as np

_STEP = 0x9E3779B97F4A7C15  # between states


def uniform(seed: int, first: int, count: int) -> np.ndarray:
    """Return numbers in [0, 1) for the documents `first` .. `first + count - 1`, functions of the seed and each document's
    number."""
    start = np.frombuffer(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), dtype="<u8")
    return _mixed(start + np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(_STEP)) / 2.0**64


def drawn(keys: np.ndarray, draw: int) -> np.ndarray:
    """Return a number of 64 bits for each of `keys`, (N,) of uint64; another one for another `draw`."""
    return _mixed(keys + np.uint64(draw * _STEP % 2**64))


def uniform_for(keys: np.ndarray, draw: int) -> np.ndarray:
    """Return what is `drawn` as numbers in [0, 1), (N,) of float64."""
    return drawn(keys, draw) / 2.0**64


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
