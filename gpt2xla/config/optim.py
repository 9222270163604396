"""The options of the optimizer and its schedule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from gpt2xla.config.options import Share, flag, option, require, require_at_least

WARMUP_SHARE = 0.0375
DECAY_SHARE = 0.2
_NOAM_WARMUP = 750  # which is a factor of its peak, so it does not follow the run's length
# Methods of which no step but those of a final decay depends on the end of the run: --decay-now can end it anywhere.
OPEN_ENDED = ("wsd", "constant", "inverse-sqrt")
# The schedule's options that a method does not use.
UNUSED: dict[str, tuple[str, ...]] = {
    "cosine": ("decay_shape", "decay_now"),
    "linear": ("decay_shape", "decay_now"),
    "constant": ("decay_steps",),
    "noam": ("min_lr", "decay_steps", "decay_shape", "decay_now"),
}


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer"""

    optim_type: Literal["adam", "adamw", "muon"] = option(
        "adamw",
        "adam adds --weight-decay to the gradient; adamw decays the weights; muon makes the updates of the blocks' matrices "
        "orthogonal and uses adamw for the rest",
    )
    learning_rate: float = option(6e-4, "peak learning rate (noam: the factor of the formula)")
    betas: tuple[float, float] = option((0.9, 0.95), "decay rates of Adam's two averages")
    weight_decay: float = option(0.1, "weight decay of matrices and embeddings; biases and layer norms have none")
    decay_method: Literal["cosine", "linear", "wsd", "constant", "inverse-sqrt", "noam"] = option(
        "cosine",
        "learning rate after the warm-up: cosine and linear fall over the whole run; wsd stays, then falls in a final "
        "decay; constant stays; inverse-sqrt falls as 1/sqrt(step); noam: the Transformer's formula",
    )
    warmup_steps: int | Share | None = option(
        None, "steps of linear warm-up, or their share of the run (default: 3.75% of the run; noam: 750)"
    )
    min_lr: float = option(
        6e-5,
        "final learning rate: cosine and linear have it from --decay-steps on, the others at the end of a final decay",
    )
    decay_steps: int | Share | None = option(
        None,
        "cosine, linear: the step at which --min-lr is reached, warm-up included (default: --train-steps); wsd, "
        "inverse-sqrt: how many steps at the end of the run are its final decay (default: 20% of the run for wsd, 0 for "
        "inverse-sqrt); or a share of the run",
    )
    decay_shape: Literal["1-sqrt", "linear"] | None = option(
        None, "shape of a final decay: 1-sqrt falls fast at first, linear evenly (default: 1-sqrt)"
    )
    decay_now: int | None = option(
        None,
        "with --resume PATH: a final decay of so many steps from that checkpoint of a wsd, constant or inverse-sqrt run, "
        "which ends the run",
    )
    max_grad_norm: float = option(1.0, "clip the norm of the whole gradient to this; 0 means no clipping")
    steps: int = 0  # of the whole run, as `over` sets it

    def check(self) -> None:
        require_at_least(0, self, "learning_rate", "weight_decay", "min_lr", "max_grad_norm")
        require_at_least(1, self, "decay_now")
        for name in ("warmup_steps", "decay_steps"):
            if not isinstance(getattr(self, name), Share):
                require_at_least(0, self, name)
        for beta in self.betas:
            require(0 <= beta < 1, f"--betas {self.betas[0]} {self.betas[1]}: each must be at least 0 and below 1")

    def check_method(self, given: frozenset[str]) -> None:
        """Raise InputError if one of the options `given` has no meaning for the method, or --min-lr is above the peak."""
        for name in UNUSED.get(self.decay_method, ()):
            others = [m for m in ("cosine", "linear", *OPEN_ENDED) if name not in UNUSED.get(m, ())]
            require(
                name not in given or getattr(self, name) is None,
                f"{flag(name)} has no meaning with --decay-method {self.decay_method}; leave it out, or choose "
                f"{', '.join(others[:-1])} or {others[-1]}",
            )
        require(
            self.decay_method not in ("cosine", "linear", "wsd") or self.min_lr <= self.learning_rate,
            f"--min-lr {self.min_lr} is above --learning-rate {self.learning_rate}; lower it",
        )

    def over(self, steps: int) -> OptimConfig:
        """Return the same for a run of so many steps: warm-up and decay as whole numbers, given ones, shares or defaults.
        The default shares of cosine are those of the published recipe: 750 and 20,000 of 20,000."""
        decays = {"cosine": steps, "linear": steps, "wsd": round(DECAY_SHARE * steps)}
        warmup = _NOAM_WARMUP if self.decay_method == "noam" else round(WARMUP_SHARE * steps)
        shape = (self.decay_shape or "1-sqrt") if self.decay_method in OPEN_ENDED else None
        return dataclasses.replace(
            self,
            steps=steps,
            warmup_steps=_whole(self.warmup_steps, steps, warmup),
            decay_steps=_whole(self.decay_steps, steps, decays.get(self.decay_method, 0)),
            decay_shape=shape,
        )

    @property
    def final_decay(self) -> int:
        """How many steps at the end of the run are its final decay. Only after `over`, and for open-ended methods."""
        assert self.decay_method in OPEN_ENDED
        assert isinstance(self.decay_steps, int)
        return self.decay_steps if self.decay_now is None else self.decay_now

    @property
    def decay_start(self) -> int:
        """After how many steps the final decay begins."""
        return max(0, self.steps - self.final_decay)


def _whole(number: int | Share | None, steps: int, default: int) -> int:
    return default if number is None else number.of(steps) if isinstance(number, Share) else number
