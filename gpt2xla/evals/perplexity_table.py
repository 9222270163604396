"""A table that compares the loss and perplexity of several models on one split."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2xla.checkpoint.loading import build_model, load_weights, locate
from gpt2xla.checkpoint.run_folder import stays_in_documents
from gpt2xla.checkpoint.seal import step_of
from gpt2xla.config import DataConfig, RunConfig, TrainConfig
from gpt2xla.config.paths import is_url
from gpt2xla.data.opening import end_of_text_of, open_validation, tokenizer_of, with_document_mask
from gpt2xla.data.shards import Manifest
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.data.tokenizer_folder import has_tokenizer, model_folder
from gpt2xla.data.windows import Windows
from gpt2xla.errors import InputError, as_named
from gpt2xla.evals.options import markdown_table
from gpt2xla.evals.validation import Validation, Validator
from gpt2xla.logs.console import say
from gpt2xla.logs.sinks import perplexity, with_error
from gpt2xla.runtime.base import Runtime

_COLUMNS = ("Model", "Parameters", "Loss", "Perplexity", "Tokens", "Standard error of the loss", "Bits per byte")


@dataclass(frozen=True)
class Row:
    """One model's line in the table. `parameters` does not count rows that only pad the vocabulary."""

    model: str
    source: Path  # the folder or file
    parameters: int
    seq_length: int
    within_documents: bool  # as with --document-mask
    validation: Validation
    windows: tuple[np.ndarray, np.ndarray]  # summed loss and tokens of each

    def as_dict(self) -> dict[str, Any]:
        measured = self.validation._asdict() | {"perplexity": perplexity(self.validation.loss)}
        return (
            {"model": self.model, "parameters": self.parameters, "seq_length": self.seq_length}
            | measured
            | {"document_mask": self.within_documents}
        )

    def __str__(self) -> str:
        return f"{self.model}, loss {with_error(self.validation.loss, self.validation.standard_error)}"


def sources_of(models: Sequence[str]) -> dict[str, Path]:
    """Return the folder or file of each model. Raises InputError if there is no such model."""
    return {model: locate(model) for model in models}


def measure(sources: dict[str, Path], valid_dir: str, train: TrainConfig, runtime: Runtime) -> Iterator[Row]:
    """Yield each model's loss on the split, in windows of the model's own length. Collective. Raises InputError if there
    is no such split, or a model does not know the split's tokens."""
    for model, source in sources.items():
        yield measure_one(model, source, valid_dir, train, runtime, stays_in_documents(source))


def best_of(rows: Sequence[Row]) -> Row | None:
    """Return the model with the lowest loss; None if some are measured within documents and others across them."""
    if len({row.within_documents for row in rows}) > 1:
        return None
    return min(rows, key=lambda row: row.validation.loss)


def run_of(source: Path) -> tuple[str | None, int]:
    """Return the folder of the run that saved the checkpoint `source`, and its step; None and 0 for another model. What a
    run left behind when it went back is a run of its own."""
    step, (before, is_named, _) = step_of(source), source.name.partition("step-")
    if not step or not is_named:
        return None, 0
    return f"{as_named(source.parent)}{f' ({before[:-1]})' if before else ''}", step


def markdown(rows: list[Row]) -> str:
    """Return the rows as a table in Markdown."""
    lines = []
    for row in rows:
        loss, error, tokens, _, bits = row.validation
        shown = (f"{loss:.4f}", f"{perplexity(loss):.2f}", f"{tokens:,}", _decimals(error), _decimals(bits))
        lines.append([row.model, f"{row.parameters:,}", *shown])
    return markdown_table(_COLUMNS, lines)


def measure_one(
    name: str, source: Path, valid_dir: str, train: TrainConfig, runtime: Runtime, within_documents: bool
) -> Row:
    """Return the loss of one model, within documents as with --document-mask or across them. Collective. Raises as
    `measure` does."""
    model_config, weights = load_weights(source)
    train = dataclasses.replace(train, document_mask=within_documents or None)
    config = RunConfig(data=DataConfig(valid_dir=valid_dir), model=model_config, train=train)
    windows = open_split(name, source, config)
    config = with_document_mask(config, [windows])
    if runtime.is_main:
        for note in windows.stream.notes:
            say(note, error=True)
    for note in weights.notes if runtime.is_main else ():
        print(f"{name}: {note}", file=sys.stderr)
    model = build_model(model_config, weights, source)
    if config.train.document_mask:
        tokenizer = tokenizer_of(config, [source], [windows])
        model.end_of_text = end_of_text_of(config, tokenizer, [windows])
        was_trained_so = stays_in_documents(source)
        if runtime.is_main and was_trained_so != windows.stream.is_masked:  # else it is measured as expected
            why = f"{name} was trained with --document-mask" if was_trained_so else "the split is masked rows"
            say(f"note: {name} is measured within documents: {why}", error=True)
    del weights
    validator = Validator(config, windows, model, runtime, f"validation step of {name}")
    runtime.setup_model(model, validator.tokens)
    losses = validator.window_losses()
    padding = model_config.vocab_padding * model_config.d_model * (1 if model_config.tie_weights else 2)
    return Row(
        name, source, model.num_parameters() - padding, windows.seq_length, bool(config.train.document_mask),
        validator.result(*losses), losses,
    )  # fmt: skip


def open_split(name: str, source: Path, config: RunConfig) -> Windows:
    """Open --valid-dir for the model of `source`. Raises InputError if there is no such split, or the model does not know
    its tokens."""
    valid_dir, ids = config.data.valid_dir, config.model.real_vocab_size
    manifest = None if is_url(valid_dir) else Manifest.load(Path(valid_dir))
    if manifest and manifest.vocab_size > ids:
        raise InputError(
            f"--model {name}: it has {ids} ids, and --valid-dir {valid_dir} was made with a tokenizer of "
            f"{manifest.vocab_size} ({manifest.tokenizer}); measure it on a split that its own tokenizer made"
        )
    try:
        windows = open_validation(config)
    except InputError as error:
        raise InputError(f"--model {name}: {error}") from None
    _check_tokenizer(name, source, windows.stream.manifest)
    return windows


def _check_tokenizer(name: str, source: Path, manifest: Manifest | None) -> None:
    folder = model_folder(source)
    if manifest is None or not has_tokenizer(folder):
        return
    if not load_tokenizer(str(folder)).made(manifest):
        raise InputError(
            f"--model {name}: its tokenizer is not the one that made --valid-dir ({manifest.tokenizer}), so its loss there "
            f"means nothing; prepare the text again with --tokenizer {folder}"
        )


def _decimals(number: float | None) -> str:
    return "" if number is None else f"{number:.4f}"
