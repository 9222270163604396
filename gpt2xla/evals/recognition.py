"""Which word a drawing shows: the likelihood of each word after the drawing, as a model that was trained on sketches gives
it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from gpt2xla.errors import InputError
from gpt2xla.generation.decoding import Reader
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Device
from gpt2xla.runtime.one_device import OneDevice
from gpt2xla.sketches.format import SketchFormat

_ROWS = 8  # words that are read side by side, where they have several tokens


class Guess(NamedTuple):
    """A word that a drawing may show."""

    word: str
    probability: float  # among the words


def likeliest(
    model: GPT2,
    sketches: SketchFormat,
    picture: np.ndarray,
    count: int = 5,
    *,
    rows: int = 0,
    width: int = 0,
    device: Device | None = None,
) -> list[Guess]:
    """Return the `count` likeliest words of a picture, the likeliest first. Arguments and errors: `word_log_probabilities`."""
    (found,) = word_log_probabilities(model, sketches, [picture], rows=rows, width=width, device=device)
    shares = np.exp(found - np.logaddexp.reduce(found))
    return [Guess(sketches.words[i], float(shares[i])) for i in np.argsort(-found, kind="stable")[:count]]


@torch.no_grad()
def word_log_probabilities(
    model: GPT2,
    sketches: SketchFormat,
    pictures: Sequence[np.ndarray],
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
        rows, width, device: see `generate`. With the same ones, it needs no other programs.

    Raises InputError if a picture has more tokens than the model can read, RunFailed if the model computes NaN."""
    model.eval()
    answers = [tuple(sketches.answer(word)) for word in sketches.words]
    beginnings = sorted({answer[:n] for answer in answers for n in range(1, len(answer))}, key=lambda b: (len(b), b))
    rows = max(rows, min(len(beginnings), _ROWS), 1)
    reader = Reader(model, rows, width, device or OneDevice(model.wte.weight.device))
    longest = max(map(len, answers))
    found = np.empty((len(pictures), len(answers)))
    for number, picture in enumerate(pictures):
        prompt = sketches.naming_prompt(picture)
        if (needed := len(prompt) + longest - 1) > model.config.seq_length:
            raise InputError(
                f"a drawing and its word are {needed} tokens here, and a model of --seq-length {model.config.seq_length} "
                "reads at most as many; use a model of longer sequences"
            )
        # All rows of the cache hold the picture, for the beginnings of words to come after it.
        after = {(): reader.read([0] * rows, [prompt] * rows)[0].double().log_softmax(-1)}
        for first in range(0, len(beginnings), rows):
            part = beginnings[first : first + rows]
            logits_BV = reader.read([len(prompt)] * len(part), part)
            after |= zip(part, logits_BV[: len(part)].double().log_softmax(-1), strict=True)
        found[number] = [sum(float(after[answer[:n]][id]) for n, id in enumerate(answer)) for answer in answers]
    return found
