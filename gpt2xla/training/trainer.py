"""The training loop, the same on every device. `runtime.base.Runtime` hides what differs between devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from gpt2xla.checkpoint.saver import Saver
from gpt2xla.config import TrainConfig
from gpt2xla.data.batch_plan import Phase
from gpt2xla.data.windows import Batch, TrainingOrder
from gpt2xla.errors import RunFailed
from gpt2xla.evals.schedule import Evaluations, is_due
from gpt2xla.logs.console import say
from gpt2xla.runtime import memory
from gpt2xla.runtime.base import Runtime, Shortage
from gpt2xla.runtime.stop import Stop
from gpt2xla.training.run_log import RunLog
from gpt2xla.training.train_step import TrainStep, packed


@dataclass
class Trainer:
    """The loop of one process. `pretrain` opens everything that it drives."""

    config: TrainConfig
    runtime: Runtime
    order: TrainingOrder
    train_step: TrainStep
    evaluations: Evaluations
    saver: Saver
    log: RunLog
    stop: Stop

    def run(self, first_step: int, is_evaluated: bool) -> tuple[int, bool]:
        """Train, and return the step reached, and whether the evaluations due after it are done. It is the last step, or an
        earlier one if all processes agreed to stop, or the evaluations have ended the run.

        Args:
            first_step: updates already made.
            is_evaluated: whether the evaluations due after them are done.

        Raises RunFailed if the last checkpoint could not be written, the loss is no longer a number, or memory ran out."""
        try:
            step, is_evaluated = self._loop(first_step, is_evaluated)
        finally:
            problem = self.saver.wait()
            self.log.close()
        self.stop.conclude()  # all processes wait here for the save
        if problem:
            raise RunFailed(f"step {step} {problem}; rerun the same command")
        return step, is_evaluated

    def _loop(self, first_step: int, is_evaluated: bool) -> tuple[int, bool]:
        step, stopping = first_step, False
        first = phase = self.order.plan.at(step)
        update = self.runtime.compile_step(self._update, "training step")
        self.train_step.model.train()
        if not is_evaluated:
            is_evaluated = self.evaluations.run(step, self.log.evaluation_line)
            stopping = not is_evaluated or self.evaluations.have_ended_run
            with self.runtime.watch.part("saving"):
                self.saver.keep(step, is_evaluated)
        batches = self.runtime.device_batches(self.order.batches(step))
        self.log.throughput.restart()
        while step < self.config.train_steps and not stopping:
            if self.order.plan.at(step) != phase:
                phase = self.order.plan.at(step)
                self._announce(phase)
                # Updates of another size are another program, which the name announces on XLA.
                size = "" if phase.sequences == first.sequences else f" of {phase.sequences:,} sequences"
                update = self.runtime.compile_step(self._update, f"training step{size}")
            advice = partial(self._smaller_batch, phase)
            with memory.explain_out_of_memory(self.runtime, f"in step {step + 1}", advice):
                update(batches, step, phase)
                step += 1
                if step == max(first_step, phase.from_step) + 1:  # it may have compiled: the clock starts after it
                    self.runtime.wait()
                    self.log.throughput.restart()
            stopping = self.stop.agreed()
            if stopping:
                is_evaluated = not self.evaluations.are_due(step)
            else:
                is_evaluated = self.evaluations.run(step, self.log.evaluation_line)
                stopping = not is_evaluated or self.evaluations.have_ended_run
            is_to_be_saved = stopping or is_due(self.config.save_interval, step, self.config.train_steps)
            if is_to_be_saved or self.evaluations.found_best(step):
                self._save(step, is_evaluated)
                stopping = stopping or self.stop.agreed()  # meanwhile: this checkpoint will do
        self.stop.begin_save()  # the last one may still be under way, and all processes wait for it
        self.runtime.wait()
        return step, is_evaluated

    def _announce(self, phase: Phase) -> None:
        if self.runtime.is_main:
            shown = phase.describe(self.runtime.devices, self.train_step.config.model.seq_length)
            say(f"batch after step {phase.from_step:,}: {shown}")

    def _update(self, batches: Iterator[Batch], step: int, phase: Phase) -> None:
        """Make one update, and queue its loss, gradient norm and stop requests for the host. On XLA this is one graph."""
        loss, grad_norm, lr = self.train_step(batches, step, phase, self.order.trained_tokens(step))
        values, receive_requests = packed(self.runtime, loss, grad_norm, self.stop.requested()), self.stop.receiver()
        log = self.log.training_line(step + 1, lr)

        def ready(loss: float, grad_norm: float, requests: float) -> None:
            receive_requests(requests)
            log(loss, grad_norm)

        self.runtime.when_ready(ready, values)

    def _save(self, step: int, is_evaluated: bool) -> None:
        with self.runtime.watch.part("saving"):
            self.saver.save(step, is_evaluated)
        self.log.throughput.restart()

    def _smaller_batch(self, phase: Phase, shortage: Shortage) -> str:
        """Advise a batch that fits, tried on this device where that is cheap."""
        runtime, train_step, parameters = self.runtime, self.train_step, self.train_step.model.num_parameters()

        def fits(sequences: int) -> bool | None:
            return runtime.memory.has_room_for(partial(train_step.rehearse, sequences))

        return memory.train_advice(shortage, phase.options(self.config), runtime.devices, parameters, fits)
