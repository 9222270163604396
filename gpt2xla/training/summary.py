"""What a run prints at its start and at its end."""

from __future__ import annotations

from pathlib import Path

from gpt2xla.checkpoint.folder import step_folder
from gpt2xla.checkpoint.start import Start
from gpt2xla.config import RunConfig
from gpt2xla.data.opening import TrainingData
from gpt2xla.data.windows import TrainingOrder
from gpt2xla.evals.validation import Validation
from gpt2xla.logs.console import say
from gpt2xla.logs.sinks import perplexity
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.optim.schedule import describe
from gpt2xla.runtime import memory
from gpt2xla.runtime.base import Runtime
from gpt2xla.runtime.precision import label


def print_start(start: Start, runtime: Runtime, data: TrainingData, model: GPT2) -> None:
    """Print what was found, what the run is, and a warning if this machine's memory looks too small for it."""
    for note in (*start.notes, *data.notes):
        print(note)
    if start.training:
        print(f"resuming {start.source} after step {start.step}")
    elif start.source:
        print(f"weights from {start.source}; the run starts at step 0")
    for name, text in _summary(start.config, start.step, runtime, data, model).items():
        print(f"{name:>10}: {text}", flush=True)
    train, parameters = start.config.train, model.num_parameters()
    if warning := memory.host_warning(model.config, train, parameters, runtime.memory.free(), runtime.devices):
        say(warning, error=True)


def print_end(config: RunConfig, step: int, stop_reason: str, validation: Validation | None) -> None:
    """Print how the run ended after `step`, and where its checkpoint is."""
    if step < config.train.train_steps:
        print(f"stopped by {stop_reason or 'another process'} after step {step}; rerun the same command to resume")
    elif validation:
        print(f"done: validation loss {validation.loss:.4f}, perplexity {perplexity(validation.loss):.2f}")
    print(f"checkpoint: {step_folder(Path(config.general.checkpoints_dir), step)}")


def _summary(config: RunConfig, first_step: int, runtime: Runtime, data: TrainingData, model: GPT2) -> dict[str, str]:
    train, sizes, order = config.train, config.model, data.order
    checked = ", all as their manifests say" if config.data.verify_data else ""
    note = f" ({runtime.precision.note})" if runtime.precision.note else ""
    return {
        "model": f"{model.num_parameters():,} parameters: {sizes.num_layers} layers, d_model {sizes.d_model}, "
        f"{sizes.num_heads} heads, vocabulary {sizes.vocab_size:,}, sequences of {sizes.seq_length}, "
        f"dropout {sizes.dropout}",
        "devices": runtime.description,
        "precision": f"{label(runtime.precision.name)}, matmul {train.matmul_precision}{note}",
        "kernels": model.kernels.description,
        "batch": f"{train.train_batch_size // runtime.devices} sequences x {runtime.devices} devices x "
        f"{train.gradient_accum_step} micro-steps = {data.sequences_per_step} sequences = {data.tokens_per_step:,} tokens "
        "per step",
        "data": f"{_training_data(order)} to train on, {data.validation.stream.length:,} to validate on{checked}",
        "run": f"steps {first_step + 1} to {train.train_steps}: {train.train_steps * data.tokens_per_step:,} tokens in "
        f"all, {_epochs(order, train.train_steps * data.sequences_per_step)}",
        "schedule": describe(config.optim),
        "tokenizer": data.tokenizer.name if data.tokenizer else "none found: checkpoints will lack one (--tokenizer)",
        "output": str(Path(config.general.checkpoints_dir)),
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
