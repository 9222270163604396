"""The learning rate of each update."""

from __future__ import annotations

import math

from gpt2xla.config import OptimConfig
from gpt2xla.errors import counted


def learning_rate(config: OptimConfig, d_model: int, step: int) -> float:
    """Return the rate of update `step`, counted from 0.

    cosine: linear warm-up to `learning_rate` at step `warmup_steps` - 1, then half a cosine down to `min_lr` at step
    `decay_steps`, then constant (Loshchilov and Hutter 2017, SGDR, without restarts).
    noam: `learning_rate` * d_model^-0.5 * min(n^-0.5, n * warmup_steps^-1.5) with n = step + 1 (Vaswani et al. 2017,
    equation 3)."""
    assert config.warmup_steps is not None, "RunConfig sets what the user leaves out"
    n = step + 1
    if config.decay_method == "noam":
        ramp = n * max(config.warmup_steps, 1) ** -1.5
        return config.learning_rate * d_model**-0.5 * min(n**-0.5, ramp)
    if n <= config.warmup_steps:
        return config.learning_rate * n / config.warmup_steps
    assert config.decay_steps is not None
    progress = min(1.0, (step - config.warmup_steps) / (config.decay_steps - config.warmup_steps))
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


def describe(config: OptimConfig) -> str:
    """Return the schedule in words, for a run's summary."""
    assert config.warmup_steps is not None
    warmup = f"warm-up of {counted(config.warmup_steps, 'step')}"
    if config.decay_method == "noam":
        return f"{warmup}, then as noam's formula"
    return f"{warmup} to {config.learning_rate:.2e}, cosine decay to {config.min_lr:.2e} at step {config.decay_steps:,}"


def past_decay(config: OptimConfig, steps: int) -> str:
    """Return a note if a run of `steps` outlasts its decay, otherwise ""."""
    assert config.decay_steps is not None
    if config.decay_method == "noam" or config.decay_steps >= steps:
        return ""
    return (
        f"note: the learning rate stays at {config.min_lr:.2e} from step {config.decay_steps:,} to {steps:,}, because its "
        "decay ends there; --decay-steps changes that"
    )
