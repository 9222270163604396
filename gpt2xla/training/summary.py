"""What a run is, in a few lines, as it says at its start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpt2xla.checkpoint.start import Start
from gpt2xla.data.windows import TrainingOrder
from gpt2xla.runtime.precision import label

if TYPE_CHECKING:
    from gpt2xla.training.trainer import Trainer


def summary(trainer: Trainer, start: Start) -> dict[str, str]:
    config, runtime, order = trainer.config, trainer.runtime, trainer.order
    train, model, tokens = config.train, config.model, trainer.tokens_per_step
    checked = ", all as their manifests say" if config.data.verify_data else ""
    note = f" ({runtime.precision.note})" if runtime.precision.note else ""
    return {
        "model": f"{trainer.model.num_parameters():,} parameters: {model.num_layers} layers, d_model {model.d_model}, "
        f"{model.num_heads} heads, vocabulary {model.vocab_size:,}, sequences of {model.seq_length}, "
        f"dropout {model.dropout}",
        "devices": runtime.description,
        "precision": f"{label(runtime.precision.name)}, matmul {train.matmul_precision}{note}",
        "kernels": trainer.model.kernels.description,
        "batch": f"{trainer.per_device} sequences x {runtime.devices} devices x {train.gradient_accum_step} micro-steps "
        f"= {trainer.sequences_per_step} sequences = {tokens:,} tokens per step",
        "data": f"{_training_data(order)} to train on, {trainer.valid_windows.stream.length:,} to validate on{checked}",
        "run": f"steps {start.step + 1} to {train.train_steps}: {train.train_steps * tokens:,} tokens in "
        f"all, {_epochs(order, train.train_steps * trainer.sequences_per_step)}",
        "tokenizer": trainer.tokenizer.name
        if trainer.tokenizer
        else "none found: checkpoints will lack one (--tokenizer)",
        "output": str(trainer.folder),
    }


def _training_data(order: TrainingOrder) -> str:
    if len(order.sets) == 1:
        return f"{order.sets[0].stream.length:,} tokens"
    parts = zip(order.sets, order.mixture.shares, strict=True)
    return " + ".join(f"{share:.2%} from {w.stream.name} ({w.stream.length:,} tokens)" for w, share in parts)


def _epochs(order: TrainingOrder, sequences: int) -> str:
    parts = zip(order.epochs, order.mixture.shares, strict=True)
    counts = ", ".join(f"{share * sequences / epoch.per_epoch:.2f}" for epoch, share in parts)
    return f"{counts} epochs"
