"""Validation loss: the sum of all token losses over the number of tokens, each token counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2xla.data.windows import Batch
from gpt2xla.model import GPT2
from gpt2xla.runtime.base import Runtime


class Validation(NamedTuple):
    loss: float  # mean token loss, in nats
    tokens: int


class Validator:
    """Runs the model over validation batches; the first call compiles, later ones reuse it."""

    def __init__(self, model: GPT2, runtime: Runtime) -> None:
        self.model = model
        self.runtime = runtime
        self._step: Callable[[Tensor, Batch], Tensor] = runtime.compile_step(self._accumulate)

    def run(self, batches: Iterable[Batch]) -> Validation:
        """Loss over this process's `batches` and all others' together. Collective."""
        self.model.eval()
        totals = self.runtime.to_device(torch.zeros(2))
        for batch in self.runtime.device_batches(batches):
            totals = self._step(totals, batch)
        loss, tokens = self.runtime.sum(totals).tolist()
        self.model.train()
        return Validation(loss / tokens, int(tokens))

    @torch.no_grad()
    def _accumulate(self, totals: Tensor, batch: Batch) -> Tensor:
        with self.runtime.autocast():
            loss, count = self.model(*batch)
        return totals + torch.stack([loss, count])
