"""How many tokens a validation split needs."""

from __future__ import annotations

import math

USEFUL_TOKENS = 20_000
_SPREAD = 3  # nats: the standard deviation of token losses, roughly that of every trained model


def noise_of(tokens: int) -> str:
    """Say how noisy a loss over so many tokens is at least: as if they were independent draws. Tokens of one document are
    not, so where documents differ much it may be several times as noisy."""
    return f"validation losses will be noisy, by ±{_SPREAD / math.sqrt(tokens):.2f} or more"
