"""Several models side by side: the loss on a split, HellaSwag and MMLU, each with its difference from the first model's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2xla.checkpoint.loading import load_weights
from gpt2xla.checkpoint.run_folder import stays_in_documents
from gpt2xla.config import DataConfig, RunConfig, TrainConfig
from gpt2xla.data.tokenizer import find_tokenizer
from gpt2xla.evals import hellaswag, mmlu
from gpt2xla.evals.multiple_choice import Question, ask
from gpt2xla.evals.options import markdown_table
from gpt2xla.evals.perplexity_table import Row, measure_one, open_split
from gpt2xla.evals.validation import standard_error
from gpt2xla.logs.sinks import with_error
from gpt2xla.runtime.base import Runtime

_LOSS, _BITS = "Loss (nats per token)", "Bits per byte"
_OTHER_SPLITS = "Losses per token do not compare between tokenizers; bits per byte do, if both splits are of one text."
_WITHIN_DOCUMENTS = "Only some of the models were trained with --document-mask, so all losses are measured without it."
_ERRORS = "±: standard error; that of a difference takes items, or windows of the same tokens, in pairs."


@dataclass(frozen=True)
class Tasks:
    """What the models are measured on; None for what is not asked."""

    valid_dirs: Sequence[str]  # none, one for all models, or one for each
    hellaswag: list[hellaswag.Item] | None
    mmlu: mmlu.Items | None
    shots: int

    def valid_dir(self, number: int) -> str | None:
        """Return the split of model `number`."""
        return self.valid_dirs[number % len(self.valid_dirs)] if self.valid_dirs else None


class Figure(NamedTuple):
    """A mean over windows or items."""

    value: float
    standard_error: float | None
    parts: tuple[np.ndarray, np.ndarray, float]  # `value` is sum(first) / sum(second) * third
    data: str  # figures of the same data have the same parts

    def minus(self, other: Figure) -> tuple[float, float | None]:
        """Return the difference and its standard error: from the differences of the parts, or, where these are not the
        same, as if the two were independent."""
        difference = self.value - other.value
        (sums, counts, scale), (other_sums, _, other_scale) = self.parts, other.parts
        if self.data == other.data:
            error = standard_error(sums * scale - other_sums * other_scale, counts)
            return difference, error
        errors = self.standard_error, other.standard_error
        return difference, None if None in errors else math.hypot(*errors)  # type: ignore[arg-type]


class Comparison:
    """The figures of all models by name, in the order of the table."""

    def __init__(self, models: Sequence[str], tasks: Tasks) -> None:
        self.models, self.tasks = models, tasks
        self.figures: list[dict[str, Figure]] = []  # of each model that is measured
        self.notes = [_ERRORS]
        if len(set(tasks.valid_dirs)) > 1:
            self.notes.append(_OTHER_SPLITS)

    def measure(self, sources: Sequence[Path], tokenizer: str | None, train: TrainConfig, runtime: Runtime) -> None:
        """Measure the models. Collective. Raises InputError if a model does not know the tokens of its split, or has no
        tokenizer."""
        for number, (model, source) in enumerate(zip(self.models, sources, strict=True)):
            self._check(number, model, source, tokenizer)
        within = [stays_in_documents(source) for source in sources]
        for number, (model, source) in enumerate(zip(self.models, sources, strict=True)):
            figures: dict[str, Figure] = {}
            if valid_dir := self.tasks.valid_dir(number):
                row = measure_one(model, source, valid_dir, train, runtime, all(within))
                figures |= _of_loss(row, valid_dir)
                if within[number] and not row.within_documents:
                    self.notes += [] if _WITHIN_DOCUMENTS in self.notes else [_WITHIN_DOCUMENTS]
            figures |= self._of_choices(source, tokenizer, train, runtime)
            self.figures.append(figures)

    def _check(self, number: int, model: str, source: Path, tokenizer: str | None) -> None:
        """Raise what `measure` would only raise after hours, when the models before this one are measured."""
        config, _ = load_weights(source)
        if valid_dir := self.tasks.valid_dir(number):
            open_split(model, source, RunConfig(data=DataConfig(valid_dir=valid_dir), model=config))
        if self.tasks.hellaswag is not None or self.tasks.mmlu is not None:
            find_tokenizer(tokenizer, source, config.real_vocab_size)

    def _of_choices(
        self, source: Path, tokenizer: str | None, train: TrainConfig, runtime: Runtime
    ) -> Iterator[tuple[str, Figure]]:
        sets: dict[str, Sequence[Question]] = {}
        if self.tasks.hellaswag is not None:
            sets["HellaSwag"] = hellaswag.questions(self.tasks.hellaswag)
        if self.tasks.mmlu is not None:
            sets["MMLU"] = mmlu.questions(self.tasks.mmlu)
        if not sets:
            return
        found = dict(zip(sets, ask(sets, source, tokenizer, runtime, train.eval_batch_size), strict=True))
        if self.tasks.hellaswag is not None:
            accuracy = hellaswag.accuracy(self.tasks.hellaswag, found["HellaSwag"])
            yield "HellaSwag acc", _of_right(accuracy.right)
            yield "HellaSwag acc_norm", _of_right(accuracy.right_norm)
        if self.tasks.mmlu is not None:
            result = mmlu.result(self.tasks.mmlu, found["MMLU"])
            yield f"MMLU, {self.tasks.shots}-shot", _of_right(result.right, result.score().standard_error)
            for group, scores in result.scores().items():
                right = result.right[np.isin(result.subjects, mmlu.GROUPS[group])]
                yield f"MMLU {group}", _of_right(right, scores[group].standard_error)

    def differences(self, name: str) -> list[tuple[float, float | None]]:
        """Return how each later model's figure differs from the first one's, and the standard error; none for losses per
        token that do not compare."""
        if name == _LOSS and _OTHER_SPLITS in self.notes:
            return []
        first, *others = (figures[name] for figures in self.figures)
        return [other.minus(first) for other in others]

    def names(self) -> list[str]:
        """Return the figures that all models have."""
        return [name for name in self.figures[0] if all(name in figures for figures in self.figures)]

    def markdown(self) -> str:
        """Return the table in Markdown, with the notes below it."""
        first, *others = self.models
        head = ["", *self.models, *(f"{other} − {first}" for other in others)]  # noqa: RUF001  a minus sign
        rows = []
        for name in self.names():
            values = [with_error(*figures[name][:2]) for figures in self.figures]
            differences = [with_error(*one) for one in self.differences(name)] or [""] * len(others)
            signed = [text if text.startswith("-") or not text else f"+{text}" for text in differences]
            rows.append([name, *values, *signed])
        return "\n".join([markdown_table(head, rows), *self.notes]) + "\n"

    def as_dict(self) -> dict[str, Any]:
        def both(value: float, error: float | None) -> dict[str, float | None]:
            return {"value": value, "standard_error": error}

        return {
            "models": list(self.models),
            "figures": {
                name: {
                    "models": [both(*figures[name][:2]) for figures in self.figures],
                    "differences": [both(*one) for one in self.differences(name)],
                }
                for name in self.names()
            },
            "notes": self.notes,
        }

    def panels(self) -> dict[str, dict[str, list[tuple[float, float | None]]]]:
        """Return what a picture shows, by the label of its axis: accuracies, and the one kind of loss that compares."""
        names = self.names()
        losses = [name for name in (_BITS, _LOSS) if name in names]
        shown = {"Accuracy": [name for name in names if name not in losses]} | {name: [name] for name in losses[:1]}
        return {
            label: {name: [figures[name][:2] for figures in self.figures] for name in of}
            for label, of in shown.items()
            if of
        }


def _of_loss(row: Row, valid_dir: str) -> dict[str, Figure]:
    (loss, error, _, _, bits), data = row.validation, f"{valid_dir}, windows of {row.seq_length}"
    figures = {_LOSS: Figure(loss, error, (*row.windows, 1.0), data)}
    if bits is not None:
        scale = bits / loss
        figures[_BITS] = Figure(bits, None if error is None else error * scale, (*row.windows, scale), data)
    return figures


def _of_right(right: np.ndarray, error: float | None = None) -> Figure:
    each = np.ones(len(right))
    error = standard_error(right, each) if error is None else error
    return Figure(float(right.mean()), error, (right.astype(float), each, 1.0), "items")
