"""Which word a drawing shows: the likelihood of each word after the drawing, by a model that was trained on sketches.

Words are compared by their whole likelihood, the product over their tokens, each after the naming prompt and the tokens
before it. `Recogniser` measures held-out drawings in training, `likeliest` names a single one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from gpt2xla.data.permutation import permute
from gpt2xla.data.windows import Windows
from gpt2xla.errors import InputError
from gpt2xla.evals.multiple_choice import MultipleChoice, Rows
from gpt2xla.generation.decoding import Reader
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Device, Runtime
from gpt2xla.runtime.one_device import OneDevice
from gpt2xla.runtime.stop import Stop
from gpt2xla.sketches.format import Picture, SketchFormat

_MOST_DRAWINGS = 1000  # that training measures: a standard error of 0.016 at most
_MOST_ROWS = 2**15  # that it reads for them, of which a word of several tokens needs one after each drawing
_ROWS = 8  # words that are read side by side, where they have several tokens


class Recognition(NamedTuple):
    """How many drawings a model recognised."""

    top1: float  # the share whose word is the likeliest
    top5: float  # the share whose word is among the five likeliest
    drawings: int

    def line(self) -> dict[str, Any]:
        """Return what a run logs of it."""
        return {"sketch_top1": self.top1, "sketch_top5": self.top5, "sketch_drawings": self.drawings}


class Recogniser:
    """Measures how many drawings of a split a model recognises, each time the same ones: up to 1,000 from anywhere in it, or
    fewer where words have several tokens, so that all together are at most 32,768 rows to read.

    Args:
        batch_size: sequences of full length per batch, over all devices together.

    Raises InputError if the split holds no whole drawing of one of the words, or something else where one should be."""

    def __init__(
        self,
        sketches: SketchFormat,
        windows: Windows,
        model: GPT2,
        runtime: Runtime,
        batch_size: int,
        stop: Stop | None = None,
    ) -> None:
        rows_each = 1 if sketches.has_single_tokens else len(sketches.words)
        held_out = read_sketches(windows, sketches, min(_MOST_DRAWINGS, max(1, _MOST_ROWS // rows_each)))
        self.labels = np.array([sketches.words.index(word) for _, word in held_out])
        self.choice = MultipleChoice(
            "sketch recognition",
            naming_rows(sketches, [picture for picture, _ in held_out], model.config.seq_length),
            model, runtime, batch_size, stop,
        )  # fmt: skip

    def run(self) -> Recognition:
        """Measure. Collective. Raises as `RowLosses.of` does."""
        return recognition(self.choice.run(), self.labels)


def recognition(log_probabilities: np.ndarray, labels: np.ndarray) -> Recognition:
    """Return how many drawings are recognised, from the (drawings, words) log-probabilities and the numbers of the right
    words (drawings,). Of equally likely words the first ones are chosen."""
    chosen = np.argsort(-log_probabilities, axis=1, kind="stable")[:, :5] == labels[:, None]
    return Recognition(float(chosen[:, 0].mean()), float(chosen.any(1).mean()), len(labels))


def read_sketches(windows: Windows, sketches: SketchFormat, most: int) -> list[tuple[Picture, str]]:
    """Return up to `most` drawings of the format's words from a split, and their words: those of as many whole rows as that
    takes, in an order drawn by chance, the same each time. Raises InputError as `Recogniser` does."""
    stream, length, known = windows.stream, windows.seq_length, set(sketches.words)
    found: list[tuple[Picture, str]] = []
    for row in permute(np.arange(windows.count), windows.count, "sketches").tolist():
        try:
            found += [one for one in sketches.sketches(stream.read(row * length, length + 1)) if one[1] in known]
        except ValueError as error:
            where = f"{stream.option} {stream.name}, row {row}"
            raise InputError(f"{where}: {error}; prepare it again with scripts/prepare_sketches.py") from None
        if len(found) >= most:
            return found[:most]
    if not found:
        raise InputError(
            f"{stream.option} {stream.name} holds no whole sketch of the words of its tokenizer, so recognition cannot be "
            "measured; prepare it again with scripts/prepare_sketches.py"
        )
    return found


def naming_rows(sketches: SketchFormat, pictures: Sequence[Picture], seq_length: int) -> Rows:
    """Return what `MultipleChoice` asks about pictures: which of the words is the answer to a naming prompt. Raises
    InputError if one has more tokens than a model of `seq_length` reads."""
    answers = [sketches.answer(word) for word in sketches.words]
    prompts = [sketches.naming_prompt(picture) for picture in pictures]
    _check_length(max(map(len, prompts)) + max(map(len, answers)), seq_length)
    if sketches.has_single_tokens:
        last = np.concatenate(answers)
        tokens = [np.append(prompt, last[:1]) for prompt in prompts]
        return Rows(tokens, [1] * len(tokens), len(answers), seq_length, np.tile(last, (len(tokens), 1)))
    tokens = [np.concatenate([prompt, answer]) for prompt in prompts for answer in answers]
    return Rows(tokens, [len(answer) for answer in answers] * len(prompts), len(answers), seq_length)


def _check_length(tokens: int, seq_length: int) -> None:
    if tokens > seq_length + 1:
        raise InputError(
            f"a drawing and its word are {tokens} tokens, and a model of --seq-length {seq_length} predicts at most "
            f"{seq_length + 1}; use a model of longer sequences"
        )


class Guess(NamedTuple):
    """A word that a drawing may show."""

    word: str
    probability: float  # among the words


def likeliest(
    model: GPT2,
    sketches: SketchFormat,
    picture: Picture,
    count: int = 5,
    *,
    rows: int = 0,
    width: int = 0,
    device: Device | None = None,
) -> list[Guess]:
    """Return the `count` likeliest words of a picture, the likeliest first. Arguments and errors are those of
    `word_log_probabilities`."""
    (found,) = word_log_probabilities(model, sketches, [picture], rows=rows, width=width, device=device)
    shares = np.exp(found - np.logaddexp.reduce(found))
    return [Guess(sketches.words[i], float(shares[i])) for i in np.argsort(-found, kind="stable")[:count]]


@torch.no_grad()
def word_log_probabilities(
    model: GPT2,
    sketches: SketchFormat,
    pictures: Sequence[Picture],
    *,
    rows: int = 0,
    width: int = 0,
    device: Device | None = None,
) -> np.ndarray:
    """Return the log-probability of each word after each picture (pictures, words), in float64 and nats: the sum over the
    word's tokens, each after the naming prompt and the word's tokens before it.

    A picture is read once. Where each word is one token, that is all; otherwise the beginnings of words are read after it,
    several side by side, each once even if many words begin with it.

    Args:
        pictures: (size, size) bool each, True where there is ink.
        rows: of the cache, of which each reads the beginning of a word; by default as many as are useful.
        width, device: see `generate`. With the same three, it needs no other programs.

    Raises InputError if a picture has more tokens than the model can read, RunFailed if the model computes NaN."""
    model.eval()
    answers = [tuple(sketches.answer(word).tolist()) for word in sketches.words]
    beginnings = sorted({answer[:n] for answer in answers for n in range(1, len(answer))}, key=lambda b: (len(b), b))
    rows = rows or min(len(beginnings), _ROWS) or 1
    reader = Reader(model, rows, width, device or OneDevice(model.wte.weight.device))
    longest = max(map(len, answers))
    found = np.empty((len(pictures), len(answers)))
    for number, picture in enumerate(pictures):
        prompt = sketches.naming_prompt(picture).tolist()
        _check_length(len(prompt) + longest, model.config.seq_length)
        # All rows of the cache hold the picture, for the beginnings of words to come after it.
        after = {(): reader.read([0] * rows, [prompt] * rows)[0].double().log_softmax(-1)}
        for first in range(0, len(beginnings), rows):
            part = beginnings[first : first + rows]
            logits_BV = reader.read([len(prompt)] * len(part), part)
            after |= zip(part, logits_BV[: len(part)].double().log_softmax(-1), strict=True)
        found[number] = [sum(float(after[answer[:n]][id]) for n, id in enumerate(answer)) for answer in answers]
    return found
