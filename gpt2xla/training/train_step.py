"""One update of the weights, from micro-batches to the optimizer: what every device runs, and what a TPU compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpt2xla.config import RunConfig
from gpt2xla.data.windows import Batch
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.optim.schedule import learning_rate
from gpt2xla.runtime.base import Runtime
from gpt2xla.runtime.stop import Stop


class TrainStep:
    """Model and optimizer on the device, and the update of both.

    Args:
        model: on the CPU; it is moved.
        saved: the optimizer's state and the runtime's own, as a checkpoint stored them; None starts from zeros.
        stop: hears which processes wish to stop.
        report: called as `report(step, lr)` in the loop, it returns what receives (loss, gradient norm) once the device has
            them; `step` counts from 1.
    """

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        model: GPT2,
        saved: dict[str, Any] | None,
        stop: Stop,
        report: Callable[[int, float], Callable[[float, float], None]],
    ) -> None:
        self.config, self.runtime, self.model, self.stop, self.report = config, runtime, model, stop, report
        self.parallel_model = runtime.setup_model(model)
        self.optimizer = runtime.build_optimizer(model, config.optim, saved["optimizer"] if saved else None)
        runtime.load_state_dict(saved["runtime"] if saved else {})
        self.accum = config.train.gradient_accum_step
        self.tokens = config.train.train_batch_size * self.accum * config.model.seq_length

    def __call__(self, batches: Iterator[Batch], step: int) -> None:
        """Update number `step`, counted from 0."""
        runtime = self.runtime
        runtime.seed(self.config.general.seed, step)
        lr = learning_rate(self.config.optim, self.config.model.d_model, step)
        runtime.set_learning_rate(self.optimizer, lr)
        loss_sum = None
        for micro_step in range(self.accum):
            with runtime.accumulate(self.parallel_model, sync=micro_step == self.accum - 1):
                with runtime.autocast():
                    loss, _ = self.parallel_model(*next(batches))
                runtime.backward(loss / self.tokens)
            loss_sum = loss.detach() if loss_sum is None else loss_sum + loss.detach()
        assert loss_sum is not None
        loss, grad_norm = runtime.optimizer_step(
            self.model, self.optimizer, loss_sum, max_grad_norm=self.config.optim.max_grad_norm
        )
        wishes, hear = runtime.sum(self.stop.requested()), self.stop.receiver()
        log = self.report(step + 1, lr)

        def ready(loss: float, grad_norm: float, wishes: float) -> None:
            hear(wishes)
            log(loss, grad_norm)

        runtime.when_ready(ready, torch.stack([loss / self.tokens, grad_norm, wishes]))

    def rehearse(self, sequences: int) -> None:
        """Hold what a step of several micro-steps does at its peak, with `sequences` on this device: their activations,
        beside whole gradients. On this process alone, and for a run that has failed: nothing is updated."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(sequences, self.config.model.seq_length, dtype=torch.int64, device=self.runtime.device)
        with self.runtime.autocast():
            loss, _ = self.model(ids, ids)
        torch.autograd.grad(loss, parameters)  # unlike backward(), it wakes none of DistributedDataParallel's hooks
