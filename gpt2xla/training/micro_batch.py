"""--train-batch-size auto: the largest micro-batch that fits, chosen once the data are known to be right."""

from __future__ import annotations

import gc
import itertools
from functools import partial

import torch

from gpt2xla.config import RunConfig
from gpt2xla.data.batch_plan import BatchPlan
from gpt2xla.data.windows import Batch
from gpt2xla.errors import counted
from gpt2xla.logs.console import say
from gpt2xla.model.gpt2 import blank
from gpt2xla.runtime.base import Runtime
from gpt2xla.runtime.trial import Trial
from gpt2xla.training.train_step import TrainStep, packed


def choose(config: RunConfig, runtime: Runtime, end_of_text: int | None = None) -> RunConfig:
    """Return the run with numbers instead of --train-batch-size auto, and print them. All processes choose what fits each of
    them, and their runtimes choose kernels for it from here on. Collective.

    Args:
        end_of_text: as in `GPT2`.

    Raises InputError if the update does not divide over the devices."""
    trial, memory = DeviceTrial(config, runtime, end_of_text), runtime.memory
    known = int(min(runtime.gather(memory.remembered(trial) or 0)))
    share = known or int(min(runtime.gather(memory.most_that_fit(trial))))
    gc.collect()  # the weights of the last trial
    if runtime.is_main:
        memory.remember(trial, share)
        say(in_words(trial, share) + (", as an earlier run found" if known else ""))
    return trial.use(share)


def in_words(trial: Trial, share: int) -> str:
    """Return what was chosen."""
    train = trial.config_of(share).train
    steps = "" if train.batch_ramp else f" --gradient-accum-step {train.gradient_accum_step}"
    return (
        f"micro-batch: {counted(share, 'sequence')} per device; --train-batch-size {train.train_batch_size}{steps} for "
        f"{counted(trial.sequences, 'sequence')} per update"
    )


class DeviceTrial(Trial):
    """Trials on the devices of a runtime, with weights of no meaning."""

    def __init__(self, config: RunConfig, runtime: Runtime, end_of_text: int | None = None) -> None:
        super().__init__(config, runtime.devices)
        self.runtime, self.end_of_text, self._options = runtime, end_of_text, runtime.train

    def use(self, share: int) -> RunConfig:
        """Return the run with `share`, for which the runtime chooses kernels from here on."""
        self.runtime.train = self._options.with_micro_batch(share * self.devices)
        return self.config_of(share)

    def rehearse(self, share: int) -> bool | None:
        fits = self.runtime.memory.has_room_for(partial(self._step(share).rehearse, share))
        answers = self.runtime.gather(-1.0 if fits is None else float(fits))
        return None if min(answers) < 0 else all(answers)

    def update(self, share: int) -> None:
        runtime, step = self.runtime, self._step(share)
        first, *later = BatchPlan.of(step.config.train, self.devices).phases
        phase = max([first, *later], key=lambda phase: phase.sequences)
        shape = phase.batch_size // runtime.world_size, self.config.model.seq_length
        batch = Batch(*(torch.zeros(shape, dtype=torch.int64) for _ in range(2)))  # one tensor would be another graph
        batches = runtime.device_batches(itertools.repeat(batch, phase.accum))

        def work() -> torch.Tensor:
            loss, grad_norm, _ = step(batches, 0, phase, phase.sequences * self.config.model.seq_length)
            return packed(runtime, loss, grad_norm, runtime.flag(False))

        size = "" if phase.sequences == first.sequences else f" of {phase.sequences:,} sequences"  # as in the loop
        runtime.compile_step(work, f"training step{size}")().tolist()  # once they can be read, the update is done

    def _step(self, share: int) -> TrainStep:
        gc.collect()  # what a failed trial holds in circles; XLA would compile what is pending there once more
        model = blank(self.config.model)
        model.end_of_text = self.end_of_text
        step = TrainStep(self.use(share), self.runtime, model, None)
        step.model.train()
        return step
