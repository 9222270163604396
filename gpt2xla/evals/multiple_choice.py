"""Multiple choice: which of a question's answers does the model find likeliest? Answers are scored as EleutherAI's
lm-evaluation-harness scores tasks of the type `multiple_choice`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.data.tokenizer import Tokenizer, find_tokenizer
from gpt2xla.data.windows import Batch, padded_share
from gpt2xla.errors import InputError
from gpt2xla.evals.row_losses import RowLosses
from gpt2xla.logs.progress import Progress
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.loss import IGNORED_LABEL
from gpt2xla.runtime.base import Runtime
from gpt2xla.runtime.stop import Stop

_SHORTEST_BUCKET = 128  # tokens; the flash kernels take multiples of it
_ENCODED_AT_ONCE = 256  # questions: what a tokenizer returns besides ids takes much memory


class Question(NamedTuple):
    """A context and its possible answers, as many for each question of a set. A blank joins the two."""

    context: str
    answers: Sequence[str]


class Rows(NamedTuple):
    """Questions as tokens: a row for each answer, one question's after the other's; or, of questions whose answers differ in
    their last token only, a row for each question, which the model reads once."""

    tokens: list[np.ndarray]  # of context and answer, at most seq_length + 1: the last one is only predicted
    answer_tokens: list[int]  # how many tokens at the end of each row belong to the answer
    answers: int  # of each question
    seq_length: int  # of the model
    # Of each answer, (questions, answers), where the rows are those of the first answers.
    last_tokens: np.ndarray | None = None


class MultipleChoice:
    """Finds the log-probability of each answer. Inputs are padded to one of a few lengths, and each length is a step that
    compiles once.

    Args:
        name: of the set of questions, for messages.
        batch_size: sequences of full length per batch, over all devices together; batches of shorter ones hold more."""

    def __init__(
        self, name: str, rows: Rows, model: GPT2, runtime: Runtime, batch_size: int, stop: Stop | None = None
    ) -> None:
        self.name, self.rows, self.runtime, self.batch_size = name, rows, runtime, batch_size
        lengths = np.array([len(tokens) - 1 for tokens in rows.tokens])
        bounds = bucket_lengths(rows.seq_length)
        bucket_of = np.searchsorted(bounds, lengths)
        self._buckets = [
            (
                length,
                np.flatnonzero(bucket_of == number),
                RowLosses(model, runtime, f"{name} step of {length} tokens", stop),
            )
            for number, length in enumerate(bounds)
            if (bucket_of == number).any()
        ]
        self.tokens = sum(length * len(inputs) for length, inputs, _ in self._buckets)  # how many the model reads

    def run(self) -> np.ndarray:
        """Return the log-probability of each answer (questions, answers) in nats, on every process: each is scored once,
        whatever the number of processes. Collective. Raises as `RowLosses.of` does."""
        last = self.rows.last_tokens
        found = np.empty((len(self.rows.tokens), 1 if last is None else self.rows.answers))
        count = sum(-(-len(inputs) // self._inputs_at_once(length)) for length, inputs, _ in self._buckets)
        with Progress(self.name, count, shown=self.runtime.is_main) as progress:
            for length, inputs, losses in self._buckets:
                sums = losses.of(self._batches(length, inputs), progress)[:, 0].reshape(-1, found.shape[1])
                found[inputs] = -sums[: len(inputs)]
        return found.reshape(-1, self.rows.answers)

    def _batches(self, length: int, inputs: np.ndarray) -> Iterator[Batch]:
        at_once = self._inputs_at_once(length)
        share = at_once // self.runtime.world_size
        for first in range(self.runtime.rank * share, len(inputs) + self.runtime.rank * share, at_once):
            yield self._batch(length, inputs[first : first + share], share)

    def _inputs_at_once(self, length: int) -> int:
        """Return the inputs of a batch over all processes together, a number that they and their devices divide."""
        batch_size = self.batch_size * (self.rows.seq_length // length)
        world_size = self.runtime.world_size
        return padded_share(batch_size, world_size, self.runtime.devices) * world_size

    def _batch(self, length: int, inputs: np.ndarray, share: int) -> Batch:
        rows = self.rows
        ids = np.zeros((share, length), dtype=np.int64)
        labels = np.full((share, length), IGNORED_LABEL, dtype=np.int64)
        for place, number in enumerate(inputs.tolist()):
            tokens, count = rows.tokens[number], rows.answer_tokens[number]
            ids[place, : len(tokens) - 1] = tokens[:-1]
            labels[place, len(tokens) - 1 - count : len(tokens) - 1] = tokens[-count:]
        if rows.last_tokens is not None:
            last = np.full((share, rows.answers), IGNORED_LABEL, dtype=np.int64)
            last[: len(inputs)] = rows.last_tokens[inputs]
            labels = np.concatenate([labels, last], axis=1)
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels))


def ask(
    sets: Mapping[str, Sequence[Question]], source: Path, tokenizer: str | None, runtime: Runtime, batch_size: int
) -> list[np.ndarray]:
    """Return the log-probabilities (questions, answers) that the model in `source` gives to the answers of each set.
    Collective. Raises InputError if there is no such model or tokenizer, or an answer is too long for it."""
    config, weights = load_weights(source)
    for note in weights.notes if runtime.is_main else ():
        print(note, file=sys.stderr)
    encoder = find_tokenizer(tokenizer, source, config.real_vocab_size)
    rows = {name: encode(name, questions, encoder, config.seq_length) for name, questions in sets.items()}
    model = build_model(config, weights, source)
    del weights
    choices = [MultipleChoice(name, rows[name], model, runtime, batch_size) for name in sets]
    runtime.setup_model(model, sum(choice.tokens for choice in choices))
    return [choice.run() for choice in choices]


def encode(name: str, questions: Sequence[Question], tokenizer: Tokenizer, seq_length: int) -> Rows:
    """Encode each context together with each of its answers, joined by a blank. What follows the context's own tokens is the
    answer; blanks at the end of a context belong to it. A context that is too long loses its beginning. Raises InputError if
    an answer has no token, or more tokens than a model of `seq_length` can predict."""
    rows = Rows([], [], len(questions[0].answers), seq_length)
    has_one_input = True  # of each question, whatever the answer: these differ in their last token only
    for first in range(0, len(questions), _ENCODED_AT_ONCE):
        part = questions[first : first + _ENCODED_AT_ONCE]
        contexts = tokenizer.encode_batch([question.context.rstrip() for question in part])
        texts = [f"{context} {answer}" for context, answers in part for answer in answers]
        wholes = iter(tokenizer.encode_batch(texts))
        for number, context in enumerate(contexts, first + 1):
            for answer in range(1, rows.answers + 1):
                ids = np.asarray(next(wholes), dtype=tokenizer.dtype)
                count = len(ids) - len(context)
                if not 0 < count <= seq_length:
                    raise InputError(
                        f"{name} item {number}: its answer {answer} has {count} tokens, and a model of --seq-length "
                        f"{seq_length} predicts 1 to {seq_length}; use a model of longer sequences"
                    )
                rows.tokens.append(ids[-(seq_length + 1) :])
                rows.answer_tokens.append(count)
            own = rows.tokens[-rows.answers :]
            has_one_input &= all(np.array_equal(tokens[:-1], own[0][:-1]) for tokens in own)
    if not has_one_input:
        return rows
    last = np.array([tokens[-1] for tokens in rows.tokens]).reshape(-1, rows.answers)
    return Rows(rows.tokens[:: rows.answers], rows.answer_tokens[:: rows.answers], rows.answers, seq_length, last)


def bucket_lengths(seq_length: int) -> list[int]:
    """Return 128, 256, 512, ... up to the last one below `seq_length`, and `seq_length`."""
    lengths = [_SHORTEST_BUCKET]
    while lengths[-1] < seq_length:
        lengths.append(2 * lengths[-1])
    return [*lengths[:-1], seq_length]
