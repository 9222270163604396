"""How the next token is drawn from its logits: greedily, or by temperature, top-k, top-p and repetition penalty.

Shape suffix: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2xla.errors import InputError

# Logits are divided by temperature and penalty; divided by a smaller number, they would leave fp32's range.
_SMALLEST = 1e-5


@dataclass(frozen=True)
class SamplingConfig:
    """Options of the draw. Temperature 0 takes the likeliest token; top_k 0, top_p 1 and repetition_penalty 1 are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def check(self) -> None:
        if self.temperature != 0 and not _SMALLEST <= self.temperature < float("inf"):
            raise InputError(f"--temperature {self.temperature}: choose 0 (greedy) or a number of at least {_SMALLEST}")
        if self.top_k < 0:
            raise InputError(f"--top-k {self.top_k}: choose a number of at least 0 (0 is off)")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: choose a number above 0 and at most 1 (1 is off)")
        if not _SMALLEST <= self.repetition_penalty <= 1 / _SMALLEST:
            raise InputError(
                f"--repetition-penalty {self.repetition_penalty}: choose a number from {_SMALLEST} to {1 / _SMALLEST:.0f} "
                "(1 is off)"
            )


GREEDY = SamplingConfig(temperature=0)
USUAL = SamplingConfig(temperature=0.8, top_k=40)  # defaults of generate.py, and what samples during training use


def pick(logits_V: Tensor, text: Collection[int], sampling: SamplingConfig, generator: torch.Generator) -> int:
    """Draw the id that follows a text with the ids `text`, in any order."""
    if sampling.repetition_penalty != 1:
        logits_V = penalise(logits_V, text, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(probabilities(logits_V, sampling), 1, generator=generator))


def penalise(logits_V: Tensor, text: Collection[int], penalty: float) -> Tensor:
    """Return logits that make the ids of `text` less likely: positive ones are divided by `penalty` (Keskar et al. 2019,
    CTRL, section 4.1), negative ones are multiplied by it, as transformers does."""
    ids = torch.tensor(list(text), dtype=torch.int64)
    found = logits_V[ids]
    return logits_V.index_put((ids,), torch.where(found < 0, found * penalty, found / penalty))


def probabilities(logits_V: Tensor, sampling: SamplingConfig) -> Tensor:
    """Apply temperature, then top-k, then top-p, and return what is drawn from. With top-p the sum may be below 1.

    Top-p keeps the smallest set of likeliest tokens whose probability reaches p (Holtzman et al. 2020, "The Curious Case of
    Neural Text Degeneration")."""
    logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        smallest = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, -torch.inf)
    probabilities_V = logits_V.softmax(dim=-1)
    if sampling.top_p < 1:
        sorted_V, order_V = probabilities_V.sort(descending=True)
        before_V = sorted_V.cumsum(dim=-1) - sorted_V  # probability of all likelier tokens; 0 for the first
        probabilities_V[order_V[before_V >= sampling.top_p]] = 0.0
    return probabilities_V
