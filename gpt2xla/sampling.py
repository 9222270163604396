"""Text from a model: temperature, top-k and top-p sampling with cached keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2xla.errors import InputError
from gpt2xla.model import GPT2, KVCache


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn: temperature 0 takes the likeliest; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature {self.temperature}: choose a number of at least 0 (0 is greedy)")
        if self.top_k < 0:
            raise InputError(f"--top-k {self.top_k}: choose a number of at least 0 (0 is off)")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: choose a number above 0 and up to 1 (1 is off)")


@torch.inference_mode()
def generate(
    model: GPT2,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingConfig,
    generator: torch.Generator,
    *,
    vocab_size: int | None = None,
    stop_id: int | None = None,
) -> Iterator[int]:
    """New token ids after `prompt`, one by one; ends early at `stop_id`, which is not yielded.

    `vocab_size`: ids from there on are padding of the model's vocabulary and are never drawn. When the text outgrows
    the model's seq_length, the last half of it is read anew and the text goes on from there.
    """
    model.eval()
    seq_length, device = model.config.seq_length, model.wte.weight.device
    text = list(prompt)
    unread = text[-seq_length:]
    cache = KVCache(model, batch_size=1)
    for _ in range(max_new_tokens):
        if cache.length + len(unread) > seq_length:
            cache = KVCache(model, batch_size=1)
            unread = text[-max(1, seq_length // 2) :]
        logits_V = model.logits(torch.tensor([unread], device=device), cache)[0, -1, :vocab_size]
        token = pick(logits_V.float().cpu(), sampling, generator)
        if token == stop_id:
            return
        text.append(token)
        unread = [token]
        yield token


def pick(logits_V: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """Draw one token id. Top-p keeps the smallest set of likeliest tokens whose probability reaches p (Holtzman et al. 2020,
    "The Curious Case of Neural Text Degeneration")."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        smallest = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, -torch.inf)
    probabilities_V = logits_V.softmax(dim=-1)
    if sampling.top_p < 1:
        sorted_V, order_V = probabilities_V.sort(descending=True)
        before_V = sorted_V.cumsum(dim=-1) - sorted_V  # probability of all likelier tokens; 0 for the first
        probabilities_V[order_V[before_V >= sampling.top_p]] = 0.0
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
