"""What a run prints at its start and at its end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from gpt2xla.checkpoint.best import Best
from gpt2xla.checkpoint.run_folder import is_finished, step_folder
from gpt2xla.checkpoint.start import Start
from gpt2xla.config import RunConfig, TrainConfig
from gpt2xla.data.batch_plan import BatchPlan
from gpt2xla.data.opening import TrainingData
from gpt2xla.data.validation_size import USEFUL_TOKENS, noise_of
from gpt2xla.data.windows import TrainingOrder, Windows
from gpt2xla.errors import as_named, counted
from gpt2xla.evals.validation import Validation
from gpt2xla.logs.console import say
from gpt2xla.logs.sinks import perplexity, with_error
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.optim.schedule import describe
from gpt2xla.runtime import memory
from gpt2xla.runtime.base import Runtime
from gpt2xla.runtime.precision import label

# "Up to 4 epochs of repeated data are almost as good as new data" (Muennighoff et al. 2023, "Scaling data-constrained
# language models").
_MOST_EPOCHS = 4
_TOKENS_TO_LOOK_AT = 1_000_000
_FEW_UPDATES = 50  # of --epochs; warm-up and decay would take turns of one or two


def print_start(start: Start, runtime: Runtime, data: TrainingData, model: GPT2) -> None:
    """Print what was found, what the run is, and a warning if this machine's memory looks too small for it."""
    for note in (*start.notes, *data.notes):
        print(note)
    if start.training:
        print(f"resuming {as_named(start.source)} after step {start.step}")
        if changed := _changed_batch(BatchPlan.saved(start.training["data"]), data.order.plan, start.step):
            print(changed)
    elif start.source:
        print(f"weights from {as_named(start.source)}; the run starts at step 0")
    for name, text in _summary(start.config, start.step, runtime, data, model).items():
        print(f"{name:>10}: {text}", flush=True)
    for remark in remarks(start.config.train, data):
        print(remark, flush=True)
    train, parameters, free = start.config.train, model.num_parameters(), runtime.memory.free()
    largest = max(data.order.plan.from_step(start.step), key=lambda phase: phase.batch_size)
    if warning := memory.host_warning(model.config, largest.options(train), parameters, free, runtime.devices):
        say(warning, error=True)


def print_end(config: RunConfig, step: int, stop_reason: str, validation: Validation | None, best: Best) -> None:
    """Print how the run ended after `step`, and where its checkpoints are. `stop_reason` is "" if it is finished."""
    train, folder = config.train, config.general.folder
    if stop_reason:
        is_repeatable = config.general.resume == "auto" or config.optim.decay_now is not None
        again = "rerun the same command" if is_repeatable else "rerun the command without --resume"
        left = ", before the last evaluations were done" if step == train.train_steps else ""
        print(f"stopped by {stop_reason} after step {step}{left}; {again} to resume")
    elif step < train.train_steps:
        print(f"stopped: {best.why_ended(train.early_stopping_min_delta)}")
    elif validation:
        loss = with_error(validation.loss, validation.standard_error)
        print(f"done: validation loss {loss}, perplexity {perplexity(validation.loss):.2f}")
    print(f"checkpoint: {as_named(step_folder(folder, step))}")
    if train.keeps_best and is_finished(kept := step_folder(folder, best.step)):
        print(f"best checkpoint: {as_named(kept)} (validation loss {best.loss:.4f}), also {as_named(folder)}@best")


def how_to_continue(start: Start) -> str:
    """Return why the run has ended, and what would continue it."""
    train, checkpoint = start.config.train, as_named(start.source)
    if start.step == train.train_steps:
        return f"{checkpoint} is the end of the run; raise --train-steps to continue it"
    return (
        f"the run has ended early with {checkpoint}: {start.best.why_ended(train.early_stopping_min_delta)}; to continue "
        f"it, raise --early-stopping-patience {train.early_stopping_patience}, or give 0 for none"
    )


def _summary(config: RunConfig, first_step: int, runtime: Runtime, data: TrainingData, model: GPT2) -> dict[str, str]:
    train, sizes, order = config.train, config.model, data.order
    phase, *later = order.plan.from_step(first_step)
    ramp = "".join(f"; {phase.sequences:,} after step {phase.from_step:,}" for phase in later)
    checked = ", all as their manifests say" if config.data.verify_data else ""
    note = f" ({runtime.precision.note})" if runtime.precision.note else ""
    return {
        "model": f"{counted(model.num_parameters(), 'parameter')}: {counted(sizes.num_layers, 'layer')}, d_model "
        f"{sizes.d_model}, {counted(sizes.num_heads, 'head')}, vocabulary {sizes.vocab_size:,}, sequences of "
        f"{sizes.seq_length}, dropout {sizes.dropout}",
        "devices": runtime.description,
        "precision": f"{label(runtime.precision.name)}, matmul {train.matmul_precision}{note}",
        "kernels": model.computation,
        "batch": phase.describe(runtime.devices, sizes.seq_length) + ramp,
        "data": f"{_training_data(order)} to train on, {data.validation.stream.length:,}"
        f"{_masks(data.validation)} to validate on{checked}",
        "run": f"steps {first_step + 1} to {train.train_steps}: {data.tokens_after(train.train_steps):,} tokens in "
        f"all, {_epochs(order, order.plan.sequences_before(train.train_steps))}",
        "schedule": describe(config.schedule),
        "tokenizer": data.tokenizer.name if data.tokenizer else "none found: checkpoints will lack one (--tokenizer)",
        "output": as_named(folder := config.general.folder)
        + (f", by way of {folder}" if config.general.is_in_bucket else ""),
    }


def _changed_batch(saved: BatchPlan, plan: BatchPlan, step: int) -> str:
    """Return what changes where the resumed run begins; "" if its next update is as large as the saved run's."""
    old, new = saved.at(step).sequences, plan.at(step).sequences
    return "" if old == new else f"batch: {old:,} sequences per update up to step {step:,}, {new:,} from there"


def _training_data(order: TrainingOrder) -> str:
    if len(order.sets) == 1:
        return counted(order.sets[0].stream.length, "token") + _masks(order.sets[0])
    parts = zip(order.sets, order.mixture.shares, strict=True)
    return " + ".join(f"{share:.2%} from {w.stream.name} ({w.stream.length:,} tokens){_masks(w)}" for w, share in parts)


def _masks(windows: Windows) -> str:
    """Return what the masks of a split select; "" if it has none."""
    manifest = windows.stream.manifest
    if manifest is None or manifest.trained_tokens is None:
        return ""
    return f" ({manifest.trained_tokens / manifest.tokens:.1%} count, in rows of {manifest.row_length:,})"


def _epochs(order: TrainingOrder, sequences: int) -> str:
    counts = _epoch_counts(order, sequences)
    if len(counts) == 1:
        return f"{counts[0]:.2f} epochs"
    named = zip(counts, order.sets, strict=True)
    return " and ".join(f"{count:.2f} epochs of {windows.stream.name}" for count, windows in named)


def _epoch_counts(order: TrainingOrder, sequences: int) -> list[float]:
    """Return how often each data set is read in a run of so many sequences."""
    parts = zip(order.epochs, order.mixture.shares, strict=True)
    return [share * sequences / epoch.per_epoch for epoch, share in parts]


def _shown(count: float) -> str:
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def remarks(train: TrainConfig, data: TrainingData) -> Iterator[str]:
    """Yield what the user should know about these data, a line each."""
    manifest = data.validation.stream.manifest
    tokens = (manifest and manifest.trained_tokens) or data.validation.stream.length
    if tokens < USEFUL_TOKENS:
        split = f"the validation split has only {counted(tokens, 'token')}"
        yield f"note: {split}, so {noise_of(tokens)}; prepare the data with more text"
    if train.epochs is not None and train.train_steps < _FEW_UPDATES:
        made = f"{counted(train.train_steps, 'update')} of {counted(train.sequences, 'sequence')}"
        yield f"note: --epochs {train.epochs:g} is only {made}; a lower --sequences-per-update makes more"
    if any(windows.stream.is_masked for windows in data.order.sets):
        how = (
            "stays within each (--document-mask)"
            if data.end_of_text is not None
            else "reaches from one into the next (--no-document-mask)"
        )
        yield f"note: rows hold several samples, and attention {how}"
    for windows in data.order.sets if data.end_of_text is not None else ():
        first = windows.stream.read(0, min(windows.stream.length, _TOKENS_TO_LOOK_AT))
        if not (first == data.end_of_text).any():
            where = f"the first {len(first):,} tokens of {windows.stream.name}"
            yield f"note: --document-mask: {where} are one document: none of them is the end-of-text id {data.end_of_text}"
    for before, phase in itertools.pairwise(data.order.plan.phases):  # a resumed run's may be of one size
        if phase.from_step >= train.train_steps and phase.sequences != before.sequences:
            yield (
                f"note: updates of {phase.sequences:,} sequences would begin after step {phase.from_step:,}, and the run "
                f"ends after {train.train_steps:,}"
            )
    counts = _epoch_counts(data.order, data.order.plan.sequences_before(train.train_steps))
    for windows, count in zip(data.order.sets, counts, strict=True):
        if count > _MOST_EPOCHS:
            text = f"{windows.stream.name} ({counted(windows.stream.length, 'token')})"
            yield (
                f"note: the run reads {text} {_shown(count)} times; after about {_MOST_EPOCHS}, a model begins to learn the "
                "text by heart: watch the validation loss, and give it more text"
            )
