"""How well a model that is trained on sketches draws and recognises: --sketches-interval."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gpt2xla.config import RunConfig
from gpt2xla.config.paths import step_folder
from gpt2xla.data.opening import TrainingData
from gpt2xla.errors import InputError
from gpt2xla.evals.recognition import Recogniser
from gpt2xla.files import write_whole
from gpt2xla.generation.devices import for_generation
from gpt2xla.generation.drawing import check_can_draw, draw
from gpt2xla.generation.sampling import USUAL
from gpt2xla.logs.console import say
from gpt2xla.logs.sinks import SKETCHES_FOLDER
from gpt2xla.logs.sketch_picture import sketch_picture
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Runtime
from gpt2xla.runtime.stop import Stop
from gpt2xla.sketches.format import SketchFormat

_DRAWINGS = 20


class SketchEvaluation:
    """Measures recognition on held-out drawings, and draws words into a picture: each time the same words with the same
    random numbers, so that only what the model has learned changes it.

    Where one process computes for several devices, it only measures: XLA's partitioner aborts on the cache's writes, as for
    `Sampler`. Raises InputError if the data hold no sketches, or the model is too short for them."""

    def __init__(self, config: RunConfig, model: GPT2, data: TrainingData, runtime: Runtime, stop: Stop) -> None:
        self.model, self.runtime, self.folder = model, runtime, config.general.folder
        sketches = SketchFormat.of(data.tokenizer) if data.tokenizer else None
        if sketches is None:
            raise InputError(
                f"--sketches-interval {config.train.sketches_interval}: the data hold no sketches; prepare some with "
                "scripts/prepare_sketches.py, or leave it out"
            )
        self.format = sketches
        batch_size = config.train.eval_batch_size
        self.recogniser = Recogniser(sketches, data.validation, model, runtime, batch_size, stop)
        tell: Callable[[str], None] = partial(say, error=True) if runtime.is_main else lambda text: None
        self.draws = runtime.devices == runtime.world_size
        if not self.draws:
            tell("note: --sketches-interval draws nothing with --spmd; it only measures recognition")
            return
        self.device = for_generation(runtime, model, tell)
        seed = config.general.seed
        mixed = np.random.default_rng(abs(seed)).permutation(len(sketches.words))
        self.words = [sketches.words[mixed[number % len(mixed)]] for number in range(_DRAWINGS)]
        self.seeds = range(seed, seed + _DRAWINGS)
        for word in self.words:
            check_can_draw(config.model, sketches, word)

    def run(self, step: int) -> dict[str, Any]:
        """Return what a run logs after `step`. Collective. The random numbers of training stay as they are. Raises as
        `RowLosses.of` does."""
        line = self.recogniser.run().line()
        if self.draws and (drawn := self._draw(step)):
            line["sketches"] = drawn
        return line

    def _draw(self, step: int) -> str | None:
        """Draw, and return the picture's path in the run's folder; None if it could not be written. Every process computes
        it, and the main one writes."""
        with self.device.autocast():  # the outermost one keeps cast weights, from token to token
            pictures = draw(self.model, self.format, self.words, USUAL, self.seeds, device=self.device)
        self.model.train()
        path = f"{SKETCHES_FOLDER}/{step_folder(self.folder, step).name}.png"
        if self.runtime.is_main:
            file = self.folder / path
            try:
                file.parent.mkdir(exist_ok=True)
                write_whole(file, sketch_picture(pictures, self.words))
            except OSError as error:
                say(f"{file} cannot be written ({error.strerror}); the run continues without it", error=True)
                return None
        return path
