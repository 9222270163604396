"""What a user may have meant by an unknown option."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from gpt2xla.config.options import options_of
from gpt2xla.config.runners import TorchConfig, XlaConfig

# Names that other trainers (nanoGPT, transformers), our other programs and newcomers use -> the options that may be meant:
# the first that a program has.
_ELSEWHERE = {
    "batch": "train_batch_size batch_size", "batch_size": "train_batch_size", "train_batch_size": "batch_size",
    "micro_batch_size": "train_batch_size", "per_device_train_batch_size": "train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "lr": "learning_rate", "max_lr": "learning_rate", "min_learning_rate": "min_lr", "wd": "weight_decay",
    "num_epochs": "epochs", "num_train_epochs": "epochs", "max_iters": "train_steps",
    "max_steps": "train_steps", "num_steps": "train_steps", "steps": "train_steps", "iters": "train_steps",
    "eval_iters": "valid_steps", "eval_interval": "valid_interval", "eval_steps": "valid_interval",
    "save_steps": "save_interval", "patience": "early_stopping_patience", "early_stopping": "early_stopping_patience",
    "save_best": "keep_best", "load_best_model_at_end": "keep_best",
    "save_total_limit": "saved_checkpoint_limit", "log_interval": "wandb_logging_interval",
    "rampup_batch_size": "batch_ramp", "batch_size_rampup": "batch_ramp",
    "warmup": "warmup_steps", "warmup_iters": "warmup_steps", "lr_decay_iters": "decay_steps",
    "lr_scheduler_type": "decay_method", "grad_clip": "max_grad_norm", "optimizer": "optim_type",
    "gradient_accumulation_steps": "gradient_accum_step", "grad_accum": "gradient_accum_step",
    "precision": "mixed_precision", "dtype": "mixed_precision", "bf16": "mixed_precision", "fp16": "mixed_precision",
    "fp32": "mixed_precision", "amp": "mixed_precision",
    "out_dir": "checkpoints_dir output_dir output", "output_dir": "checkpoints_dir output",
    "out": "output output_dir checkpoints_dir", "output": "output_dir checkpoints_dir", "save_dir": "checkpoints_dir",
    "init_from": "from_checkpoint model", "checkpoint": "from_checkpoint model", "checkpoints": "from_checkpoint model",
    "ckpt": "from_checkpoint model", "from_checkpoint": "model", "checkpoints_dir": "model", "model_name": "model",
    "model_name_or_path": "from_checkpoint model", "input": "model dataset", "resume_from_checkpoint": "resume",
    "data": "train_dir valid_dir input dataset", "data_dir": "train_dir valid_dir input",
    "dataset": "train_dir valid_dir input", "dataset_name": "dataset", "test_dir": "valid_dir",
    "eval_dir": "valid_dir", "text": "prompt input", "file": "input",
    "files": "input", "limit": "max_tokens max_documents",
    "block_size": "seq_length", "context_length": "seq_length", "context": "seq_length", "max_seq_length": "seq_length",
    "n_layer": "num_layers", "n_layers": "num_layers", "layers": "num_layers", "n_head": "num_heads",
    "n_heads": "num_heads", "heads": "num_heads", "n_embd": "d_model", "n_embed": "d_model", "hidden_size": "d_model",
    "dim": "d_model", "width": "d_model",
    "max_tokens": "max_new_tokens", "max_length": "max_new_tokens", "length": "max_new_tokens", "n_tokens": "max_new_tokens",
    "n": "num_samples max_new_tokens", "num_return_sequences": "num_samples", "samples": "num_samples",
    "n_samples": "num_samples", "prompt_file": "prompts_file", "stop_sequence": "stop", "workers": "num_workers",
    "threads": "num_workers", "server_name": "host", "server_port": "port", "inbrowser": "open",
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
    if known := next((option for option in _ELSEWHERE.get(name, "").split() if option in options), None):
        return known
    if close := difflib.get_close_matches(name, options, n=1, cutoff=0.7):
        return close[0]
    return next((option for option in options if len(name) > 2 and option.startswith(name)), None)
