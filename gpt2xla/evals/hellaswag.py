"""HellaSwag (Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?"): which of four endings does the
model find likeliest? Scored as EleutherAI's lm-evaluation-harness scores its task `hellaswag` without examples.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gpt2xla import hub
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.data.windows import Batch, padded_share
from gpt2xla.errors import InputError
from gpt2xla.evals.row_losses import RowLosses
from gpt2xla.logs.progress import Progress
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.loss import IGNORED_LABEL
from gpt2xla.runtime.base import Runtime
from gpt2xla.runtime.stop import Stop

_HUB_ID, _SPLIT = "Rowan/hellaswag", "validation"
_ENDINGS = 4
_SHORTEST_BUCKET = 128  # tokens; the flash kernels take multiples of it
_IN_BRACKETS = re.compile(r"\[.*?\]")


class Item(NamedTuple):
    """One question: a context, its four possible endings, and the number of the right one, from 0."""

    context: str
    endings: tuple[str, ...]
    label: int


class Questions(NamedTuple):
    """Items as tokens: four rows for each item, one for each ending."""

    rows: list[list[int]]  # the tokens of context and ending, at most seq_length + 1: the last one is only predicted
    ending_tokens: list[int]  # how many tokens at the end of each row belong to the ending
    ending_characters: np.ndarray  # (items, 4), the length of each ending's text
    labels: np.ndarray  # (items), which ending is the right one
    seq_length: int  # of the model


class Accuracy(NamedTuple):
    """How many endings the model got right."""

    acc: float  # share of the items whose right ending has the highest sum of log-probabilities
    acc_norm: float  # the same with each sum divided by the ending's number of characters
    items: int  # how many were asked
    log_probabilities: np.ndarray  # (items, 4), in nats

    def line(self) -> dict[str, Any]:
        """Return what a run logs of it."""
        return {"hellaswag_acc": self.acc, "hellaswag_acc_norm": self.acc_norm, "hellaswag_items": self.items}

    def standard_error(self, share: float) -> float:
        """Return the standard error of `acc` or `acc_norm`, a mean of zeros and ones."""
        return math.sqrt(share * (1 - share) / max(1, self.items - 1))


class HellaSwag:
    """Scores a model. Rows are padded to one of a few lengths, and each length is a step that compiles once.

    Args:
        batch_size: sequences of full length per batch, over all devices together; batches of shorter rows hold more."""

    def __init__(
        self, questions: Questions, model: GPT2, runtime: Runtime, batch_size: int, stop: Stop | None = None
    ) -> None:
        self.questions, self.runtime, self.batch_size = questions, runtime, batch_size
        lengths = np.array([len(row) - 1 for row in questions.rows])
        bounds = bucket_lengths(questions.seq_length)
        bucket_of = np.searchsorted(bounds, lengths)
        self._buckets = [
            (
                length,
                np.flatnonzero(bucket_of == number),
                RowLosses(model, runtime, f"HellaSwag step of {length} tokens", stop),
            )
            for number, length in enumerate(bounds)
            if (bucket_of == number).any()
        ]
        self.tokens = sum(length * len(numbers) for length, numbers, _ in self._buckets)  # how many the model reads

    def run(self) -> Accuracy:
        """Score each item once, whatever the number of processes, and return the result on every process. Collective. Raises
        as `RowLosses.of` does."""
        questions = self.questions
        log_probabilities = np.empty(len(questions.rows))
        count = sum(-(-len(numbers) // self._rows_at_once(length)) for length, numbers, _ in self._buckets)
        with Progress("HellaSwag", count, shown=self.runtime.is_main) as progress:
            for length, numbers, losses in self._buckets:
                sums = losses.of(self._batches(length, numbers), progress)[:, 0]
                log_probabilities[numbers] = -sums[: len(numbers)]
        return accuracy(log_probabilities.reshape(questions.ending_characters.shape), questions)

    def _batches(self, length: int, numbers: np.ndarray) -> Iterator[Batch]:
        rows = self._rows_at_once(length)
        share = rows // self.runtime.world_size
        for first in range(self.runtime.rank * share, len(numbers) + self.runtime.rank * share, rows):
            yield self._batch(length, numbers[first : first + share], share)

    def _rows_at_once(self, length: int) -> int:
        """Return the rows of a batch over all processes together, a number that they and their devices divide."""
        batch_size = self.batch_size * (self.questions.seq_length // length)
        world_size = self.runtime.world_size
        return padded_share(batch_size, world_size, self.runtime.devices) * world_size

    def _batch(self, length: int, numbers: np.ndarray, share: int) -> Batch:
        ids = np.zeros((share, length), dtype=np.int64)
        labels = np.full((share, length), IGNORED_LABEL, dtype=np.int64)
        for place, number in enumerate(numbers.tolist()):
            row, ending = self.questions.rows[number], self.questions.ending_tokens[number]
            ids[place, : len(row) - 1] = row[:-1]
            labels[place, len(row) - 1 - ending : len(row) - 1] = row[len(row) - ending :]
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels))


def accuracy(log_probabilities: np.ndarray, questions: Questions) -> Accuracy:
    """Return the accuracy, from the (items, 4) sums of log-probabilities; among equal sums the first ending is chosen."""
    right = log_probabilities.argmax(1) == questions.labels
    with np.errstate(divide="ignore"):  # an ending that was only brackets is never chosen
        right_norm = (log_probabilities / questions.ending_characters).argmax(1) == questions.labels
    return Accuracy(float(right.mean()), float(right_norm.mean()), len(right), log_probabilities)


def bucket_lengths(seq_length: int) -> list[int]:
    """Return 128, 256, 512, ... up to the last one below `seq_length`, and `seq_length`."""
    lengths = [_SHORTEST_BUCKET]
    while lengths[-1] < seq_length:
        lengths.append(2 * lengths[-1])
    return [*lengths[:-1], seq_length]


def encode_items(items: list[Item], tokenizer: Tokenizer, seq_length: int) -> Questions:
    """Encode each context together with each of its endings, joined by a blank. What follows the context's own tokens is the
    ending; blanks at the end of a context belong to it. A context that is too long loses its beginning. Raises InputError if
    an ending has no token, or more tokens than a model of `seq_length` can predict."""
    contexts = [item.context.rstrip() for item in items]
    texts = [f"{item.context} {ending}" for item in items for ending in item.endings]
    context_tokens = [len(ids) for ids in tokenizer.encode_batch(contexts)]
    rows, ending_tokens = [], []
    for number, ids in enumerate(tokenizer.encode_batch(texts)):
        count = len(ids) - context_tokens[number // _ENDINGS]
        if not 0 < count <= seq_length:
            item, ending = divmod(number, _ENDINGS)
            raise InputError(
                f"HellaSwag item {item + 1}: its ending {ending + 1} has {count} tokens, and a model of --seq-length "
                f"{seq_length} predicts 1 to {seq_length}; use a model of longer sequences"
            )
        rows.append([int(i) for i in ids[-(seq_length + 1) :]])
        ending_tokens.append(count)
    characters = np.array([[len(ending) for ending in item.endings] for item in items])
    return Questions(rows, ending_tokens, characters, np.array([item.label for item in items]), seq_length)


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
