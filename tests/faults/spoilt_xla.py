"""Runs `run_pretrain_xla.py` with a NaN in the loss of its last process, in one step."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import run_pretrain_xla
from gpt2xla.data.batch_plan import Phase
from gpt2xla.data.windows import Batch
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.processes.exits import exit_code
from gpt2xla.training.train_step import TrainStep

AT = 17  # the step, from 1

_update, _forward, _now = TrainStep.__call__, GPT2.forward, [0]


def _noted(self: TrainStep, batches: Iterator[Batch], step: int, phase: Phase, counted: int) -> Any:
    _now[0] = step + 1
    return _update(self, batches, step, phase, counted)


def _spoilt(self: GPT2, *args: Any, **kwargs: Any) -> Any:
    loss, *rest = _forward(self, *args, **kwargs)
    is_last = int(os.environ.get("LOCAL_RANK", 0)) == int(os.environ["REPLICAS"]) - 1
    return (loss * float("nan") if _now[0] == AT and is_last else loss), *rest


def spoil() -> None:
    TrainStep.__call__ = _noted  # type: ignore[method-assign]
    GPT2.forward = _spoilt  # type: ignore[method-assign]


if __name__ in ("__main__", "__mp_main__"):  # the processes that it spawns import it under the second name
    spoil()
if __name__ == "__main__":
    sys.exit(exit_code(run_pretrain_xla.main))
