"""A pseudo-random order of any number of things. Each place of it can be computed without the others."""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np

_ROUNDS = 6
# The multipliers of MurmurHash3's 64-bit finaliser (Appleby 2011), and of splitmix64 (Steele, Lea and Flood 2014).
_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0x9E3779B97F4A7C15))
_HALF = np.uint64(32)


def permute(positions: np.ndarray, size: int, key: str) -> np.ndarray:
    """Return the entries at `positions` (int64, all below `size`) of the permutation of range(size) that `key` names, each
    in O(1) time and memory.

    A Feistel network over pairs (a, b), a < A and b < B, with A * B equal to `size` or a little more; results from `size` on
    go through it again (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    small = math.isqrt(size - 1) + 1
    sides = np.uint64(-(-size // small)), np.uint64(small)
    keys = _round_keys(key)
    values = _encipher(positions.astype(np.uint64), sides, keys)
    while len(beyond := np.flatnonzero(values >= size)):
        values[beyond] = _encipher(values[beyond], sides, keys)
    return values.astype(np.int64)


def _encipher(values: np.ndarray, sides: tuple[np.uint64, np.uint64], keys: tuple[np.uint64, ...]) -> np.ndarray:
    high, low = np.divmod(values, sides[1])
    for number, key in enumerate(keys):
        # The two parts change in turn, each by a hash of the other only, so each round can be undone.
        if number % 2 == 0:
            high = (high + _hash(low, key)) % sides[0]
        else:
            low = (low + _hash(high, key)) % sides[1]
    return high * sides[1] + low


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Return the upper 32 bits of a hash, which added to a part cannot overflow."""
    values = (values ^ key) * _MIX[0]
    values ^= values >> _HALF
    values *= _MIX[1]
    return values >> _HALF


@functools.lru_cache(maxsize=64)
def _round_keys(key: str) -> tuple[np.uint64, ...]:
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(np.frombuffer(digest, dtype="<u8"))
