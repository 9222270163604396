"""Recipes: the optimizer's options under one name."""

from __future__ import annotations

from typing import Any, Literal

Recipe = Literal["gpt2", "fast"]

# gpt2: that of the published GPT-2 reproductions, which is also what a run has by default.
# fast: the best one of benchmarks/time_to_loss.py. Its rate is for widths of 256 to 384; docs/optimizers.md has others.
RECIPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "optim_type": "adamw", "learning_rate": 6e-4, "min_lr": 6e-5, "betas": (0.9, 0.95), "weight_decay": 0.1,
        "decay_method": "cosine", "max_grad_norm": 1.0,
    },
    "fast": {
        "optim_type": "muon", "learning_rate": 0.004, "min_lr": 0.0004, "betas": (0.9, 0.95), "weight_decay": 0.1,
        "decay_method": "cosine", "max_grad_norm": 1.0,
    },
}  # fmt: skip
