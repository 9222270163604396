"""HellaSwag (Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?"): which of four endings does the
model find likeliest? Scored as EleutherAI's lm-evaluation-harness scores its task `hellaswag` without examples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2xla import hub
from gpt2xla.errors import InputError, counted
from gpt2xla.evals.multiple_choice import Question
from gpt2xla.evals.validation import standard_error
from gpt2xla.logs.sinks import with_error

_HUB_ID, _SPLIT = "Rowan/hellaswag", "validation"
_ENDINGS = 4
_IN_BRACKETS = re.compile(r"\[.*?\]")


class Item(NamedTuple):
    """One question: a context, its four possible endings, and the number of the right one, from 0."""

    context: str
    endings: tuple[str, ...]
    label: int


class Accuracy(NamedTuple):
    """Of each item, whether the model chose the right ending."""

    right: np.ndarray  # by the highest sum of log-probabilities
    right_norm: np.ndarray  # by the highest sum divided by the ending's number of characters

    @property
    def acc(self) -> float:
        return float(self.right.mean())

    @property
    def acc_norm(self) -> float:
        return float(self.right_norm.mean())

    def line(self) -> dict[str, Any]:
        """Return what a run logs of it."""
        return {"hellaswag_acc": self.acc, "hellaswag_acc_norm": self.acc_norm, "hellaswag_items": len(self.right)}

    def __str__(self) -> str:
        each = np.ones(len(self.right))
        acc = with_error(self.acc, standard_error(self.right, each))
        acc_norm = with_error(self.acc_norm, standard_error(self.right_norm, each))
        return f"HellaSwag acc {acc}, acc_norm {acc_norm} of {counted(len(self.right), 'item')}"


def questions(items: Sequence[Item]) -> list[Question]:
    """Return what the model is asked."""
    return [Question(item.context, item.endings) for item in items]


def accuracy(items: Sequence[Item], log_probabilities: np.ndarray) -> Accuracy:
    """Return the accuracy, from the (items, 4) log-probabilities; among equal ones the first ending is chosen."""
    labels = np.array([item.label for item in items])
    characters = np.array([[len(ending) for ending in item.endings] for item in items])
    with np.errstate(divide="ignore"):  # an ending that was only brackets is never chosen
        right_norm = (log_probabilities / characters).argmax(1) == labels
    return Accuracy(log_probabilities.argmax(1) == labels, right_norm)


def read_items(file: str | None, option: str) -> list[Item]:
    """Read items from a JSON lines file with the data set's fields activity_label, ctx_a, ctx_b, endings and label. Without
    a file, read the validation split from the Hugging Face hub; its labels are public. Raises InputError if there is no such
    file, an item lacks something, or the hub did not return the data set."""
    if file is None:
        return [_item(values, f"{_HUB_ID}, item {number}") for number, values in enumerate(_from_hub(option), 1)]
    items = []
    try:
        with Path(file).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    items.append(_item(json.loads(line), f"{option} {file}, line {number}"))
    except OSError as error:
        raise InputError(f"{option} {file} cannot be read: {error.strerror}; name HellaSwag's JSON lines") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{option} {file} is not JSON lines ({error}); name HellaSwag's validation set") from None
    if not items:
        raise InputError(f"{option} {file} holds no items; name HellaSwag's validation set")
    return items


def clean(text: str) -> str:
    """Return `text` without the marks of WikiHow's pages: "[title]" ends a sentence, other brackets are removed."""
    return _IN_BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _item(values: Any, where: str) -> Item:
    try:
        if values["label"] == "":
            raise ValueError("it has no label, like the test split")
        context = f"{values['activity_label']}: {values['ctx_a']} {values['ctx_b'].capitalize()}"
        item = Item(clean(context), tuple(clean(ending) for ending in values["endings"]), int(values["label"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"lacks {error.args[0]}" if isinstance(error, KeyError) else f"is not one of HellaSwag's ({error})"
        fields = "activity_label, ctx_a, ctx_b, endings, label"
        raise InputError(f"{where}: {reason}; name a set that has {fields}") from None
    if len(item.endings) != _ENDINGS or not 0 <= item.label < _ENDINGS:
        raise InputError(f"{where}: an item has {_ENDINGS} endings, and a label from 0 to {_ENDINGS - 1}")
    return item


def _from_hub(option: str) -> list[Any]:
    otherwise = f"name its validation set as JSON lines with {option}"
    with hub.explained("HellaSwag is read from the hub", _HUB_ID, otherwise, kind="data set"):
        import datasets

        return list(datasets.load_dataset(_HUB_ID, split=_SPLIT))
