"""What a model thought possible in a place of a text: its likeliest tokens, with their probabilities.

Shape suffix: V vocabulary.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from gpt2xla.data.tokenizer import Tokenizer

_BAR = 12  # characters of a probability of 1
_UNLIKELIEST = 0.001  # a token with this probability has the darkest shade


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


def tip(choices: Sequence[Choice], came: int | None = None) -> str:
    """Return a line for each token, the likeliest first, with a mark at the one that came."""
    width = max(len(choice.text) for choice in choices)
    return "\n".join(
        f"{'▸' if choice.token == came else ' '} {percent(choice.probability):>5} {choice.text:<{width}}  "
        f"{'▇' * round(choice.probability * _BAR)}".rstrip()
        for choice in sorted(choices, key=lambda choice: -choice.probability)
    )


def token_span(text: str, about: str, probability: float, kind: str = "") -> str:
    """Return a token as HTML, shaded by how unlikely it was, with the lines that are shown while one points at it."""
    unlikely = min(1.0, -math.log10(max(probability, _UNLIKELIEST)) / -math.log10(_UNLIKELIEST))
    shown = html.escape(about).replace("\n", "&#10;")
    return (
        f'<span class="token {kind}" tabindex="0" style="--unlikely:{unlikely:.2f}" data-tip="{shown}">'
        f"{html.escape(text)}</span>"
    )
