"""Tokenizers of all kinds that write sketches, and pictures, for tests."""

from __future__ import annotations

import numpy as np

from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from gpt2xla.sketches.format import SketchFormat, picture_text
from gpt2xla.sketches.tokenizer import train_tokenizer

WORDS = [
    "The Great Wall of China",
    "apple",
    "cat",
    "hot air balloon",
    "t-shirt",
    "01",
    "route 101",
    "01010101 0",
    "Über",
]
SIZES = [8, 24, 28, 33]


def pictures(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Random pictures with much and little ink, and two of nothing and all, (N, size, size)."""
    rng = np.random.default_rng(seed)
    found = rng.random((count, size, size)) < rng.random((count, 1, 1))
    found[:2] = [[[False]], [[True]]]
    return found


def tokenizer_for(kind: str, size: int) -> Tokenizer:
    """ "trained" along with drawings; "rows", byte-pair merges of the text of drawings; or a name that is known."""
    if kind == "trained":
        return train_tokenizer(dict.fromkeys(WORDS, 1), size, 1024)
    if kind == "rows":
        return train_bpe([picture_text(picture) for picture in pictures(50, size)], "rows", 330, min_frequency=2)
    return load_tokenizer(kind)


def format_for(kind: str, size: int) -> SketchFormat:
    return SketchFormat.fitted(tokenizer_for(kind, size), size, WORDS)
