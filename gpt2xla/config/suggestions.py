"""What a user may have meant by an unknown option."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from gpt2xla.config.options import options_of
from gpt2xla.config.run import TorchConfig, XlaConfig

# Names that other trainers (nanoGPT, transformers) and our other programs use -> the option that is meant.
_ELSEWHERE = {
    "batch_size": "train_batch_size", "lr": "learning_rate", "max_lr": "learning_rate", "epochs": "train_steps",
    "num_train_epochs": "train_steps", "max_iters": "train_steps", "max_steps": "train_steps",
    "eval_iters": "valid_steps", "eval_interval": "valid_interval", "warmup_iters": "warmup_steps",
    "lr_decay_iters": "decay_steps", "grad_clip": "max_grad_norm", "optimizer": "optim_type",
    "gradient_accumulation_steps": "gradient_accum_step", "dtype": "mixed_precision", "bf16": "mixed_precision",
    "fp16": "mixed_precision", "out_dir": "checkpoints_dir", "output_dir": "checkpoints_dir",
    "init_from": "from_checkpoint", "block_size": "seq_length", "context_length": "seq_length",
    "n_layer": "num_layers", "n_head": "num_heads", "n_embd": "d_model", "checkpoint": "model",
    "from_checkpoint": "model",
}  # fmt: skip
_RUNNERS = {"run_pretrain.py": TorchConfig, "run_pretrain_xla.py": XlaConfig}


def unknown(spelled: str, options: Mapping[str, str]) -> str:
    """Return the message for `spelled`, which is none of the options. `options` maps each name to how it is spelled."""
    name = spelled.lstrip("-").replace("-", "_").lower()
    if found := _meant(name, options):
        return f"{spelled} is unknown; did you mean {options[found]}?"
    for runner, group in _RUNNERS.items():
        if name in {f.name for f in options_of(group)}:
            return f"{spelled} is an option of {runner} only; leave it out here"
    return f"{spelled} is unknown (--help lists the flags)"


def _meant(name: str, options: Mapping[str, str]) -> str | None:
    if name in options:  # spelled with the wrong dashes
        return name
    if _ELSEWHERE.get(name) in options:
        return _ELSEWHERE[name]
    if close := difflib.get_close_matches(name, options, n=1, cutoff=0.7):
        return close[0]
    return next((option for option in options if len(name) > 2 and option.startswith(name)), None)
