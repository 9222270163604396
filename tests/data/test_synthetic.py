"""Synthetic tokens: the same everywhere, and learnable."""

import hashlib

import numpy as np

from gpt2xla.data.synthetic import synthetic_tokens


def test_the_tokens_are_the_same_on_every_machine() -> None:
    """The known losses of gpt2xla/tpu_check/curve.json are those of these tokens."""
    tokens = synthetic_tokens(401, 256, 512)
    assert hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()[:16] == "06c82979a6a3fe7c"
    assert tokens.shape == (401, 256)
    assert (synthetic_tokens(3, 256, 512) == tokens[:3]).all()
    assert (synthetic_tokens(3, 256, 512, seed=1) != tokens[:3]).mean() > 0.9


def test_half_of_the_tokens_follow_and_the_others_tell_the_topic() -> None:
    tokens = synthetic_tokens(400, 256, 50257).astype(np.int64)
    pairs = np.stack([tokens[:, :-1].ravel(), tokens[:, 1:].ravel()])
    often, counts = np.unique(pairs, axis=1, return_counts=True)
    # By chance a token has one follower in 50,257; here four have half.
    first = often[0] == np.bincount(tokens.ravel()).argmax()
    likeliest = np.sort(counts[first])[::-1]
    assert 0.45 < likeliest[:4].sum() / likeliest.sum() < 0.6
    words = [set(row[np.unique(row, return_index=True)[1]]) & set(tokens[0]) for row in tokens[1:]]
    shared = sorted(len(found) for found in words)
    assert shared[-10] >= 14 > 4 > shared[len(shared) // 2], "rows of one topic share their words, others hardly any"
