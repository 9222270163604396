"""What is evaluated between training steps: validation, HellaSwag, samples and sketches, each at its own interval."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from gpt2xla.checkpoint.best import Best
from gpt2xla.config import RunConfig, TrainConfig
from gpt2xla.config.options import Share
from gpt2xla.data.opening import TrainingData
from gpt2xla.errors import InputError
from gpt2xla.evals.hellaswag import accuracy, questions, read_items
from gpt2xla.evals.multiple_choice import MultipleChoice, encode
from gpt2xla.evals.samples import Sampler
from gpt2xla.evals.sketch_evaluation import SketchEvaluation
from gpt2xla.evals.validation import Validation, Validator
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime import memory
from gpt2xla.runtime.base import Runtime
from gpt2xla.runtime.stop import Stop, Stopped


class Evaluations:
    """The evaluations of a run. They are opened before it writes anything, so that wrong input shows at once:
    InputError is raised if HellaSwag's items, the sample prompt or the data's sketches cannot be used."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        model: GPT2,
        data: TrainingData,
        settings: GenerationSettings,
        stop: Stop,
        best: Best,
    ) -> None:
        self.config, self.runtime = config.train, runtime
        self.validation: Validation | None = None  # the last result
        self.best = best  # of the steps whose evaluations are all done
        validator = Validator(config, data.validation, model, runtime, stop=stop)

        def validate(step: int) -> dict[str, Any]:
            self.validation = validator.run()
            return self.validation.line()

        # The name of each evaluation, its interval in steps, and what makes it after a step.
        self._all: list[tuple[str, int | Share, Callable[[int], dict[str, Any]]]]
        self._all = [("validation", config.train.valid_interval, validate)]
        if interval := config.train.hellaswag_interval:
            hellaswag = _open_hellaswag(config, runtime, model, data, stop)
            self._all.append(("HellaSwag", interval, hellaswag))
        if interval := config.train.sample_interval:
            sampler = Sampler(config, model, data.tokenizer, settings, runtime)
            self._all.append(("sampling", interval, lambda step: {"sample": sampler.run()}))
        if interval := config.train.sketches_interval:
            self._all.append(("sketches", interval, SketchEvaluation(config, model, data, runtime, stop).run))

    def are_due(self, step: int) -> bool:
        """Whether any evaluation is due after `step`."""
        return any(is_due(interval, step, self.config.train_steps) for _, interval, _ in self._all)

    def run(self, step: int, log: Callable[[int, dict[str, Any]], None]) -> bool:
        """Make the evaluations that are due after `step`, and give `log` the step and each result.

        Return False if all processes agreed to stop meanwhile."""
        for name, interval, evaluate in self._all:
            if is_due(interval, step, self.config.train_steps):
                self.runtime.wait()
                try:
                    with self.runtime.watch.part(name), explain_evaluation(self.runtime, self.config, name):
                        log(step, evaluate(step))
                except Stopped:
                    return False
        if self.validation and is_due(self.config.valid_interval, step, self.config.train_steps):
            self.best = self.best.after(step, self.validation.loss, self.config.early_stopping_min_delta)
        return True

    def found_best(self, step: int) -> bool:
        """Whether `step` has the best validation so far, in a run that keeps its checkpoint."""
        return self.config.keeps_best and step == self.best.step

    @property
    def have_ended_run(self) -> bool:
        """Whether the loss has not improved for as long as --early-stopping-patience allows."""
        return self.best.has_ended(self.config.early_stopping_patience)


def is_due(interval: int | Share, step: int, last_step: int) -> bool:
    """Whether what is done every `interval` steps is due after `step`. After the last step it always is."""
    assert isinstance(interval, int)  # since the run's start is known
    return step == last_step or bool(interval and step % interval == 0)


def explain_evaluation(runtime: Runtime, train: TrainConfig, name: str) -> contextlib.AbstractContextManager[None]:
    """Turn running out of memory in the evaluation `name` into one line with advice."""
    return memory.explain_out_of_memory(
        runtime, f"in {name}", lambda _: memory.eval_advice(train, runtime.devices, name)
    )


def _open_hellaswag(
    config: RunConfig, runtime: Runtime, model: GPT2, data: TrainingData, stop: Stop
) -> Callable[[int], dict[str, Any]]:
    train = config.train
    if data.tokenizer is None:
        raise InputError(
            f"--hellaswag-interval {train.hellaswag_interval} needs a tokenizer, and the shards have none beside them; name "
            "theirs with --tokenizer"
        )
    items = read_items(train.hellaswag_data, "--hellaswag-data")
    rows = encode("HellaSwag", questions(items), data.tokenizer, config.model.seq_length)
    choice = MultipleChoice("HellaSwag", rows, model, runtime, train.eval_batch_size, stop)
    return lambda step: accuracy(items, choice.run()).line()
