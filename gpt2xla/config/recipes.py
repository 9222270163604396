"""Recipes: the optimizer's options under one name."""

from __future__ import annotations

from typing import Any, Literal

from gpt2xla.config.options import Share

Recipe = Literal["gpt2", "fast", "instruct"]

# gpt2: that of the published GPT-2 reproductions, which is also what a run has by default.
# fast: the best one of benchmarks/time_to_loss.py. Its rate is for widths of 256 to 384; docs/optimizers.md has others.
# instruct: for tuning a trained model. Rate, betas and weight decay are the defaults of transformers' TrainingArguments;
# cosine and warm-up are those of Stanford Alpaca (Taori et al. 2023).
RECIPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "optim_type": "adamw", "learning_rate": 6e-4, "min_lr": 6e-5, "betas": (0.9, 0.95), "weight_decay": 0.1,
        "decay_method": "cosine", "max_grad_norm": 1.0,
    },
    "fast": {
        "optim_type": "muon", "learning_rate": 0.004, "min_lr": 0.0004, "betas": (0.9, 0.95), "weight_decay": 0.1,
        "decay_method": "cosine", "max_grad_norm": 1.0,
    },
    "instruct": {
        "optim_type": "adamw", "learning_rate": 5e-5, "min_lr": 0.0, "betas": (0.9, 0.999), "weight_decay": 0.0,
        "decay_method": "cosine", "warmup_steps": Share("3%"), "max_grad_norm": 1.0,
    },
}  # fmt: skip
