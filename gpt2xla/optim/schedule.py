"""The learning rate of each update: a pure function of the options and the step."""

from __future__ import annotations

import math

from gpt2xla.config import OPEN_ENDED, OptimConfig
from gpt2xla.errors import InputError, counted


def learning_rate(config: OptimConfig, d_model: int, step: int) -> float:
    """Return the rate of update `step`, counted from 0, with the options that `OptimConfig.over` has completed.

    All but noam begin with a linear warm-up to `learning_rate` at step `warmup_steps` - 1.

    cosine, linear: then half a cosine (Loshchilov and Hutter 2017, SGDR, without restarts) or a line down to `min_lr` at
    step `decay_steps`, then constant.
    wsd: then constant, with a final decay (Hu et al. 2024, MiniCPM; Hägele et al. 2024, "Scaling laws and compute-optimal
    training beyond fixed training durations", arXiv:2405.18392).
    constant: then constant; a final decay only with `decay_now`.
    inverse-sqrt: then `learning_rate` * sqrt(warmup_steps / n) with n = step + 1 (Zhai et al. 2022, "Scaling vision
    transformers"), with a final decay if `decay_steps` asks for one.
    noam: `learning_rate` * d_model^-0.5 * min(n^-0.5, n * warmup_steps^-1.5) (Vaswani et al. 2017, equation 3).

    A final decay goes from the rate of step `decay_start` to `min_lr` at step `steps`, the end of the run. After a share p
    of it, 1 - p (linear) or 1 - sqrt(p) (1-sqrt) of the difference is left."""
    assert isinstance(config.warmup_steps, int), "RunConfig.schedule has what the user leaves out"
    rate, warmup, n = config.learning_rate, config.warmup_steps, step + 1
    if config.decay_method == "noam":
        return rate * d_model**-0.5 * min(n**-0.5, n * max(warmup, 1) ** -1.5)
    assert isinstance(config.decay_steps, int)
    if config.decay_method in ("cosine", "linear"):
        if n <= warmup:
            return rate * n / warmup
        progress = min(1.0, (step - warmup) / (config.decay_steps - warmup))
        left = 1 - progress if config.decay_method == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return config.min_lr + left * (rate - config.min_lr)
    start = config.decay_start
    if step <= start or not config.final_decay:
        return _before_final_decay(config, warmup, n)
    progress = min(1.0, (step - start) / config.final_decay)
    left = 1 - (progress if config.decay_shape == "linear" else math.sqrt(progress))
    return config.min_lr + left * (_before_final_decay(config, warmup, start + 1) - config.min_lr)


def _before_final_decay(config: OptimConfig, warmup: int, n: int) -> float:
    if n <= warmup:
        return config.learning_rate * n / warmup
    if config.decay_method == "inverse-sqrt":
        return config.learning_rate * math.sqrt(max(warmup, 1) / n)
    return config.learning_rate


def describe(config: OptimConfig) -> str:
    """Return the schedule in words, for a run's summary."""
    assert isinstance(config.warmup_steps, int)
    warmup, method = f"warm-up of {counted(config.warmup_steps, 'step')}", config.decay_method
    if method == "noam":
        return f"{warmup}, then as noam's formula"
    warmup += f" to {config.learning_rate:.2e}"
    if method in ("cosine", "linear"):
        return f"{warmup}, {method} decay to {config.min_lr:.2e} at step {config.decay_steps:,}"
    then = "falling as 1/sqrt(step)" if method == "inverse-sqrt" else "constant"
    if not config.final_decay:
        return f"{warmup}, then {then}"
    decay = (
        f"{config.decay_shape} decay from step {config.decay_start:,} to {config.min_lr:.2e} at step {config.steps:,}"
    )
    return f"{warmup}, then {then}, {decay}"


def past_decay(config: OptimConfig) -> str:
    """Return a note if a run outlasts its decay, otherwise ""."""
    assert isinstance(config.decay_steps, int)
    if config.decay_method not in ("cosine", "linear") or config.decay_steps >= config.steps:
        return ""
    return (
        f"note: the learning rate stays at {config.min_lr:.2e} from step {config.decay_steps:,} to {config.steps:,}, as "
        "its decay ends there; --decay-steps changes that"
    )


def check_final_decay(config: OptimConfig) -> None:
    """Raise InputError for a final decay that would raise the rate."""
    if config.decay_method in OPEN_ENDED and config.final_decay:
        rate = learning_rate(config, 1, config.decay_start)
        if rate < config.min_lr:
            raise InputError(
                f"--min-lr {config.min_lr} is above the learning rate of {rate:.2e} at which the final decay begins, at "
                f"step {config.decay_start}; lower it"
            )


def changed_decay(before: OptimConfig, now: OptimConfig, step: int) -> str:
    """Return a note if the rate jumps after `step` because the final decay has moved, otherwise ""."""
    if not {before.decay_method, now.decay_method} <= set(OPEN_ENDED) or before.decay_start == now.decay_start:
        return ""
    old, new = (learning_rate(config, 1, step) for config in (before, now))
    if step <= min(before.decay_start, now.decay_start) or old == new:
        return ""
    decay = f"from step {now.decay_start:,} to {now.steps:,}" if now.final_decay else "not in this run"
    moves = "goes back up" if new > old else "drops"
    return (
        f"note: the learning rate {moves} from {old:.2e} to {new:.2e} after step {step:,}; its final decay is {decay}"
    )
