"""Decides from a sample of a headerless file whether it can hold uint16 ids."""

from __future__ import annotations

import math

import numpy as np

_BLOCKS, _BLOCK_TOKENS = 16, 4096
_CERTAIN = 20  # bits: such a sample occurs by chance once in a million files


def sample_blocks(tokens: np.ndarray) -> list[np.ndarray]:
    """Return up to 16 runs of tokens, evenly spread from the first to the last; each starts at a multiple of 4."""
    starts = np.linspace(0, max(0, len(tokens) - _BLOCK_TOKENS), _BLOCKS, dtype=np.int64)
    return [tokens[start : start + _BLOCK_TOKENS] for start in np.unique(starts // 4 * 4)]


def largest_sampled(tokens: np.ndarray) -> int:
    return max(int(block.max(initial=0)) for block in sample_blocks(tokens))


def against_uint16(tokens: np.ndarray) -> str | None:
    """Return why these are not ids, and the fix, to follow the file's name; None if they may be.

    Args:
        tokens: the file read as little-endian uint16.
    """
    blocks = sample_blocks(tokens)
    if not all(block.any() for block in blocks):
        held = f"runs of {min(len(tokens), _BLOCK_TOKENS):,} and more zeros"
        return f"holds {held}: it was allocated and never written whole; copy or prepare it again"
    sample = np.concatenate(blocks)
    if _are_floats(sample):
        return "looks like fp16 or bf16 numbers, such as a model's weights, not ids; move it out of the folder"
    if (name := _wider_type(sample) or _narrower_or_swapped(sample)) is None:
        return None
    how = f"np.fromfile(FILE, {name[1]!r}).astype('<u2').tofile(NEW), where all are below 65,536"
    return f"looks like {name[0]} ids, not uint16; convert it: {how}"


def _wider_type(sample: np.ndarray) -> tuple[str, str] | None:
    """Recognise ids of four or eight bytes: every second uint16 is 0, up to 15 for a vocabulary of a million, or 65,535 for
    a negative id. With uint16 ids, small and large ones would occur in both places."""
    pairs = sample[: len(sample) // 2 * 2].reshape(-1, 2)  # the last one may be half
    if len(pairs) == 0:
        return None
    for high, name, order in ((1, "", "<"), (0, "big-endian ", ">")):
        highs, lows = pairs[:, high], pairs[:, 1 - high]
        is_high_small = ((highs < 16) | (highs == 0xFFFF)).all()
        if not highs.any() or (is_high_small and np.count_nonzero(lows >= 16) >= _CERTAIN):
            is_eight = len(pairs) > 1 and not pairs[high::2, 1 - high].any()
            return f"{name}{'int64' if is_eight else 'int32'}", f"{order}{'i8' if is_eight else 'i4'}"
    return None


def _are_floats(sample: np.ndarray) -> bool:
    """Recognise weights: they lie between -2 and 2, so their exponent's highest bit is never set, and half are negative."""
    is_negative = sample >= 0x8000
    return len(sample) >= 1000 and not (sample & 0x4000).any() and 0.4 < is_negative.mean() < 0.6


def _narrower_or_swapped(sample: np.ndarray) -> tuple[str, str] | None:
    """Recognise swapped or one-byte ids. The low byte of a uint16 id takes all values. If it stays below a limit although
    there are many different ids, it is the high byte of a swapped id, or an id itself."""
    limit, highest = int((sample & 0xFF).max()) + 1, int((sample >> 8).max())
    surprise = len(np.unique(sample)) * math.log2(256 / limit)
    if highest < 8 or surprise < 2 * _CERTAIN:
        return None
    return ("big-endian uint16", ">u2") if highest > 1.25 * limit else ("uint8", "u1")
