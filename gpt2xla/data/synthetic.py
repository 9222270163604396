"""Tokens that a model can learn, made on the spot, the same on every machine: a Markov source with a topic for each row."""

from __future__ import annotations

import numpy as np

_TOPICS, _WORDS, _FOLLOWERS = 16, 16, 4


def synthetic_tokens(rows: int, length: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Return (rows, length) token ids below `vocab_size` (up to 65,536), as uint16.

    Half of the tokens follow from the one before, which has 4 followers. The other half are words of the row's topic, of
    which there are 16 with 16 words each. A model that learns how often each token occurs, then what follows what, then to
    gather the topic from all earlier tokens of the row, has a falling loss all along; the last takes attention.

    Counters hashed by integer arithmetic alone take the place of a generator: those of libraries may change."""
    drawn = _hashed(np.arange(rows * length, dtype=np.uint64).reshape(rows, length) + _hashed(np.uint64(seed)))
    topics = drawn[:, 0] >> np.uint64(40)
    follows, choice = drawn & np.uint64(1) == 1, drawn >> np.uint64(1)
    words = _hashed((topics % _TOPICS)[:, None] * np.uint64(_WORDS) + choice % _WORDS) % vocab_size
    tokens = np.empty((rows, length), np.uint16)
    last = words[:, 0]
    for column in range(length):
        followers = _hashed((last + np.uint64(1)) * np.uint64(2**20) + choice[:, column] % _FOLLOWERS) % vocab_size
        last = np.where(follows[:, column], followers, words[:, column])
        tokens[:, column] = last
    return tokens


def _hashed(numbers: np.ndarray | np.uint64) -> np.ndarray:
    """Return 64 bits for each number: SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators")."""
    z = np.atleast_1d(numbers) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
