"""Validation loss: the sum of all token losses over the number of tokens, each token counted once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

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
        self._step = runtime.compile_step(self._add_batch, "validation step")

    def run(self, batches: Iterable[Batch]) -> Validation:
        """Loss over this process's `batches` and all others' together: each batch summed on the devices, the batches in
        float64 on the host. Collective."""
        self.model.eval()
        self._loss = self._tokens = 0.0
        for batch in self.runtime.device_batches(batches):
            self._step(batch)
        self.runtime.wait()
        self.model.train()
        return Validation(self._loss / self._tokens, int(self._tokens))

    @torch.no_grad()
    def _add_batch(self, batch: Batch) -> None:
        with self.runtime.autocast():
            loss, count = self.model(*batch)
        self.runtime.when_ready(self._add, self.runtime.sum(torch.stack([loss, count])))

    def _add(self, loss: float, count: float) -> None:
        self._loss += loss
        self._tokens += count
