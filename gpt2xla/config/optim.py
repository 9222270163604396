"""The options of the optimizer and its schedule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from gpt2xla.config.options import option, require, require_at_least

WARMUP_SHARE = 0.0375
_NOAM_WARMUP = 750  # which is a factor of its peak, so it does not follow the run's length


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
    decay_method: Literal["cosine", "noam"] = option("cosine", "shape of the schedule after the warm-up")
    warmup_steps: int | None = option(None, "steps of linear warm-up (default: 3.75% of --train-steps; noam: 750)")
    min_lr: float = option(6e-5, "cosine: the final learning rate, from --decay-steps on")
    decay_steps: int | None = option(
        None, "cosine: the step at which --min-lr is reached, warm-up included (default: --train-steps)"
    )
    max_grad_norm: float = option(1.0, "clip the norm of the whole gradient to this; 0 means no clipping")

    def check(self) -> None:
        require_at_least(0, self, "learning_rate", "weight_decay", "min_lr", "max_grad_norm", "warmup_steps")
        for beta in self.betas:
            require(0 <= beta < 1, f"--betas {self.betas[0]} {self.betas[1]}: each must be at least 0 and below 1")
        require(
            self.decay_method != "cosine" or self.min_lr <= self.learning_rate,
            f"--min-lr {self.min_lr} is above --learning-rate {self.learning_rate}; lower it",
        )

    def over(self, steps: int) -> OptimConfig:
        """Return the same with the warm-up and decay that a run of so many steps has by default. The shares are those of the
        published recipe: 750 and 20,000 of 20,000."""
        share = _NOAM_WARMUP if self.decay_method == "noam" else round(WARMUP_SHARE * steps)
        warmup = share if self.warmup_steps is None else self.warmup_steps
        decay = steps if self.decay_steps is None else self.decay_steps
        return dataclasses.replace(self, warmup_steps=warmup, decay_steps=decay)
