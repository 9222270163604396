"""One update of the weights, from micro-batches to the optimizer: what every device runs, and what a TPU compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2xla.config import RunConfig
from gpt2xla.data.batch_plan import Phase
from gpt2xla.data.windows import Batch
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.optim.schedule import learning_rate
from gpt2xla.runtime.base import Runtime


class TrainStep:
    """Model and optimizer on the device, and the update of both.

    Args:
        model: on the CPU; it is moved to the device.
        saved: the states of optimizer and runtime, as a checkpoint stored them; None starts from zeros."""

    def __init__(self, config: RunConfig, runtime: Runtime, model: GPT2, saved: dict[str, Any] | None) -> None:
        self.config, self.runtime, self.model = config, runtime, model
        model.neftune_alpha = config.train.neftune_alpha
        self.parallel_model = runtime.setup_model(model)
        self.optimizer = runtime.build_optimizer(model, config.optim, saved)

    def __call__(self, batches: Iterator[Batch], step: int, phase: Phase, counted: int) -> tuple[Tensor, Tensor, float]:
        """Make update number `step`, counted from 0, of the size that `phase` says.

        Args:
            counted: how many labels of the whole update count, on all processes together. The loss is divided by it, so that
                each of them weighs the same wherever it stands.

        Returns:
            The loss per token (nats) over all processes, the norm of the gradient before clipping, both on the device, and
            the learning rate."""
        runtime = self.runtime
        runtime.seed(self.config.general.seed, step)
        lr = learning_rate(self.config.schedule, self.config.model.d_model, step)
        tokens = runtime.number(counted)  # as data: with masked rows each update has another number
        loss_sum, noise = None, self._noise_seed(step)
        for micro_step in range(phase.accum):
            with runtime.accumulate(self.parallel_model, sync=micro_step == phase.accum - 1):
                with runtime.autocast():
                    loss, _ = self.parallel_model(*next(batches), *noise)
                runtime.backward(loss / tokens)
            loss_sum = loss.detach() if loss_sum is None else loss_sum + loss.detach()
        assert loss_sum is not None
        loss, grad_norm = runtime.optimizer_step(
            self.model, self.optimizer, loss_sum, rate=lr, max_grad_norm=self.config.optim.max_grad_norm
        )
        return loss / tokens, grad_norm, lr

    def _noise_seed(self, step: int) -> tuple[Tensor, ...]:
        """Return what `GPT2.forward` takes after a batch: with --neftune-alpha the update's seed, as data of the device."""
        if not self.config.train.neftune_alpha:
            return ()
        drawn = np.random.SeedSequence([self.config.general.seed, step]).generate_state(1)[0]
        return (self.runtime.number(float(drawn >> 8)),)

    def rehearse(self, sequences: int) -> None:
        """Use as much memory as an update of several micro-steps does at its peak, with `sequences` on this device.

        It holds their activations beside whole gradients. Only this process takes part, and nothing is updated: it is for
        before a run, and for after one that has failed."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(sequences, self.config.model.seq_length, dtype=torch.int64, device=self.runtime.device)
        for _ in range(2):  # allocations of the second find the gaps that the first has left
            with self.runtime.autocast():
                loss, _ = self.model(ids, ids)
            torch.autograd.grad(loss, parameters)  # unlike backward(), it runs none of DistributedDataParallel's hooks


def packed(runtime: Runtime, loss: Tensor, grad_norm: Tensor, requested: Tensor) -> Tensor:
    """Return what the host reads of an update, in one tensor: loss, gradient norm, and how many processes have `requested` a
    stop. Collective, and part of the step that XLA compiles."""
    return torch.stack([loss, grad_norm, runtime.sum(requested)])
