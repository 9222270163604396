"""Run by test_compile_count.py in its own process: a training run in which XLA has reason to compile again.

Arguments: those of run_pretrain_xla.py.
"""

import sys
from collections.abc import Iterator

import torch_xla
from torch import Tensor

from gpt2xla.checkpoint.saver import Saver
from gpt2xla.cli import parse_run
from gpt2xla.config import RunConfig, XlaConfig
from gpt2xla.data.batch_plan import Phase
from gpt2xla.data.windows import Batch, TrainingOrder
from gpt2xla.runtime.xla.runtime import XlaRuntime
from gpt2xla.training.pretrain import pretrain
from gpt2xla.training.train_step import TrainStep

SHORT_BATCHES = {4: 2, 5: 3}  # rows, by step
HOST_READS = (7, 8)
CONSTANTS = {12: 1, 13: 0.5}  # tokens of an update, by step: XLA takes a 1 as a constant
SAVES = (10, 15)


def worker(index: int, config: RunConfig, options: XlaConfig) -> None:
    batches, step, save = TrainingOrder.batches, TrainStep.__call__, Saver.save

    def shortened(self: TrainingOrder, first_step: int) -> Iterator[Batch]:
        accum = self.plan.at(0).accum
        for number, batch in enumerate(batches(self, first_step)):
            rows = SHORT_BATCHES.get(number // accum + 1)
            yield Batch(*(tensor[:rows] for tensor in batch))

    def disturbed(
        self: TrainStep, source: Iterator[Batch], number: int, phase: Phase, counted: int
    ) -> tuple[Tensor, Tensor, float]:
        if number + 1 in HOST_READS:
            (self.model.wte.weight[number].sum() * 3).item()
        as_data = self.runtime.number
        if number + 1 in CONSTANTS:
            self.runtime.number = lambda value: CONSTANTS[number + 1] if value == counted else as_data(value)  # type: ignore
        try:
            return step(self, source, number, phase, counted)
        finally:
            self.runtime.number = as_data  # type: ignore[method-assign]

    def computing(self: Saver, number: int, is_evaluated: bool) -> None:
        if number in SAVES:
            rows = self.model.wte.weight.detach()[:number] + 1
            torch_xla.sync()
            assert rows.shape[0] == number
        save(self, number, is_evaluated)

    TrainingOrder.batches, TrainStep.__call__, Saver.save = shortened, disturbed, computing
    pretrain(config, lambda train: XlaRuntime(options, train))


if __name__ == "__main__":
    torch_xla.launch(worker, args=parse_run(XlaConfig, sys.argv[1:]))
