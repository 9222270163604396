"""What a model thought possible in a place of a text: its likeliest tokens, with their probabilities.

Shape suffix: V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gpt2xla.data.tokenizer import Tokenizer


class Choice(NamedTuple):
    """A token as it is shown, in quotes, and its probability."""

    token: int
    text: str
    probability: float


def likeliest(logits_V: Tensor, tokenizer: Tokenizer, count: int = 5, drawn: int | None = None) -> list[Choice]:
    """Return the `count` likeliest tokens, first of all `drawn` if it is given. Probabilities are the model's own: before
    temperature, top-k, top-p and repetition penalty."""
    probabilities_V = logits_V.double().softmax(-1)
    ids = probabilities_V.topk(min(count, len(probabilities_V))).indices.tolist()
    if drawn is not None:
        ids = [drawn, *(i for i in ids if i != drawn)]
    return [Choice(i, quoted(tokenizer, i), float(probabilities_V[i])) for i in ids]


def quoted(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text in quotes on one line; what cannot be shown is written as Python does."""
    text = tokenizer.decode([token]) if token < tokenizer.vocab_size else f"id {token}"
    return f"“{''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)}”"


def percent(probability: float) -> str:
    """Return a probability as it is shown: 52%, 3.1%, <0.1%."""
    if probability < 0.001:
        return "<0.1%"
    return f"{probability:.0%}" if probability >= 0.0995 else f"{probability:.1%}"
