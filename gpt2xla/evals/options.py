"""What the evaluation programs share: their options, and the runtime that these ask for. Only opening it imports torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gpt2xla.config import PRECISION_ALIASES, Precision, TorchConfig, TrainConfig, XlaConfig, option, require_at_least

if TYPE_CHECKING:
    from gpt2xla.runtime.base import Runtime


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation"""

    device: Literal["auto", "cpu", "cuda", "mps", "xla"] = option(
        "auto", "auto: cuda, else mps, else cpu, several of them under torchrun; xla: all XLA devices of this host"
    )
    batch_size: int = option(32, "sequences per batch, over all devices together")
    mixed_precision: Precision = option(
        "none",
        "compute type; none: fp32, whose figures are comparable between devices; auto: the device's default for training",
        aliases=PRECISION_ALIASES,
    )

    def train_config(self, valid_steps: int | Literal["all"] = "all") -> TrainConfig:
        """Return the training options that evaluation reads. Raises InputError."""
        require_at_least(1, self, "batch_size")
        train = TrainConfig(
            eval_batch_size=self.batch_size, mixed_precision=self.mixed_precision, valid_steps=valid_steps
        )
        train.check()
        return train


def open_runtime(device: str, train: TrainConfig) -> Runtime:
    """Open the runtime of the --device. Raises InputError if there is no such device."""
    if device != "xla":
        from gpt2xla.runtime.torch.runtime import TorchRuntime

        return TorchRuntime(TorchConfig(), train, device)
    from gpt2xla.runtime.xla.environment import importing_torch_xla, prepare

    prepare(os.environ)
    with importing_torch_xla():
        from gpt2xla.runtime.xla.spmd import SpmdRuntime
    return SpmdRuntime(XlaConfig(spmd=True), train)
