"""The loss of the best model that ignores context: what any language model has to beat."""

from __future__ import annotations

import numpy as np

from gpt2xla.data.shards import TokenStream


def unigram_entropy(stream: TokenStream) -> float:
    """Entropy of the token frequencies of a split, in nats per token."""
    counts = np.zeros(1, dtype=np.int64)
    for start in range(0, stream.length, 1 << 24):
        part = np.bincount(stream.read(start, min(1 << 24, stream.length - start)).astype(np.int64, copy=False))
        counts = np.pad(counts, (0, max(0, len(part) - len(counts))))
        counts[: len(part)] += part
    shares = counts[counts > 0] / stream.length
    return float(-(shares * np.log(shares)).sum())
