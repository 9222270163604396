"""What the evaluation programs share: their options, and the runtime they ask for; torch is imported when it is opened."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gpt2xla.config import PRECISION_ALIASES, Precision, TorchConfig, TrainConfig, XlaConfig, option
from gpt2xla.errors import InputError

if TYPE_CHECKING:
    from gpt2xla.runtime.base import Runtime


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation"""

    device: Literal["auto", "xla"] = option(
        "auto", "auto: GPU or CPU through torch, several under torchrun; xla: all XLA devices of this host"
    )
    batch_size: int = option(32, "sequences at once, over all devices together")
    mixed_precision: Precision = option(
        "none",
        "compute type; none: fp32, whose figures compare between devices; auto: what the device trains in by default",
        aliases=PRECISION_ALIASES,
    )

    def train_config(self, valid_steps: int | Literal["all"] = "all") -> TrainConfig:
        """The options of a run that evaluation looks at. Raises InputError."""
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: choose a number of at least 1")
        train = TrainConfig(
            eval_batch_size=self.batch_size, mixed_precision=self.mixed_precision, valid_steps=valid_steps
        )
        train.check()
        return train


def open_runtime(device: str, train: TrainConfig) -> Runtime:
    """Raises InputError if there is no such device."""
    if device == "auto":
        from gpt2xla.runtime.torch.runtime import TorchRuntime

        return TorchRuntime(TorchConfig(), train)
    from gpt2xla.runtime.xla.environment import importing_torch_xla, prepare

    prepare(os.environ)
    with importing_torch_xla():
        from gpt2xla.runtime.xla.spmd import SpmdRuntime
    return SpmdRuntime(XlaConfig(spmd=True), train)
