"""The learning rate of each update."""

from __future__ import annotations

import math

from gpt2xla.config import OptimConfig


def learning_rate(config: OptimConfig, d_model: int, step: int) -> float:
    """Return the rate of update `step`, counted from 0.

    cosine: linear warm-up to `learning_rate` at step `warmup_steps` - 1, then half a cosine down to `min_lr` at step
    `decay_steps`, then constant (Loshchilov and Hutter 2017, SGDR, without restarts).
    noam: `learning_rate` * d_model^-0.5 * min(n^-0.5, n * warmup_steps^-1.5) with n = step + 1 (Vaswani et al. 2017,
    equation 3)."""
    n = step + 1
    if config.decay_method == "noam":
        ramp = n * max(config.warmup_steps, 1) ** -1.5
        return config.learning_rate * d_model**-0.5 * min(n**-0.5, ramp)
    if n <= config.warmup_steps:
        return config.learning_rate * n / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / (config.decay_steps - config.warmup_steps))
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)
