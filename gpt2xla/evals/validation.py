"""Loss and perplexity of a split, in which each token counts once, with the standard error of the loss."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from gpt2xla.config import RunConfig
from gpt2xla.data.shards import Manifest
from gpt2xla.data.windows import Windows, validation_batches, validation_windows
from gpt2xla.errors import counted
from gpt2xla.evals.row_losses import RowLosses
from gpt2xla.logs.progress import Progress
from gpt2xla.logs.sinks import perplexity
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Runtime
from gpt2xla.runtime.stop import Stop


class Validation(NamedTuple):
    """What a validation measured."""

    loss: float  # the mean token loss, in nats
    standard_error: float | None  # of `loss`, taking windows as independent draws; None for a single window
    tokens: int  # counted
    windows: int  # counted
    bits_per_byte: float | None  # of the text; None where the tokens' bytes are not known

    def line(self) -> dict[str, Any]:
        """Return what a run logs of it."""
        return {
            "valid_loss": self.loss,
            "valid_tokens": self.tokens,
            "valid_standard_error": self.standard_error,
            "valid_bits_per_byte": self.bits_per_byte,
        }

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" (standard error {self.standard_error:.6f})"
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        shown = f"loss {self.loss:.6f}{error}, perplexity {perplexity(self.loss):.4f}"
        return f"{shown} on {counted(self.tokens, 'token')}{bits}"


class Validator:
    """Measures the model's loss on the batches that --valid-steps asks for."""

    def __init__(
        self,
        config: RunConfig,
        windows: Windows,
        model: GPT2,
        runtime: Runtime,
        name: str = "validation step",
        stop: Stop | None = None,
    ) -> None:
        self.train, self.windows, self.runtime = config.train, windows, runtime
        self._windows = validation_windows(windows, config.train.eval_batch_size, config.train.valid_steps)
        self.tokens = self._windows * windows.seq_length  # how many the model reads
        self._name = name.replace(" step", "")
        self._losses = RowLosses(model, runtime, name, stop)

    def run(self) -> Validation:
        """Validate: devices sum the losses of each window, and the host sums over windows in float64. Collective. Raises as
        `RowLosses.of` does."""
        return self.result(*self.window_losses())

    def window_losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each window's summed loss in nats, and its number of tokens: 0 for rows that fill up batches. Collective.
        Raises as `RowLosses.of` does."""
        runtime, train = self.runtime, self.train
        shares = (runtime.rank, runtime.world_size, runtime.devices)
        batches = validation_batches(self.windows, train.eval_batch_size, train.valid_steps, *shares)
        with Progress(self._name, -(-self._windows // train.eval_batch_size), shown=runtime.is_main) as progress:
            sums, counts = self._losses.of(batches, progress).T
        return sums, counts

    def result(self, sums: np.ndarray, counts: np.ndarray) -> Validation:
        """Return what such losses of windows make."""
        loss = sums.sum() / counts.sum()
        return Validation(
            loss=float(loss),
            standard_error=standard_error(sums, counts),
            tokens=int(counts.sum()),
            windows=int((counts > 0).sum()),
            bits_per_byte=bits_per_byte(float(loss), self.windows.stream.manifest),
        )


def standard_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Return the standard error of sum(sums) / sum(counts) over the windows that have tokens. It is that of a ratio, because
    the last window may be shorter (Cochran 1977, "Sampling Techniques", chapter 6). For windows of one length it is the
    standard deviation of their mean losses divided by the square root of their number."""
    sums, counts = sums[counts > 0], counts[counts > 0]
    if len(counts) < 2:
        return None
    residuals = sums - sums.sum() / counts.sum() * counts
    return math.sqrt(len(counts) / (len(counts) - 1) * float(residuals @ residuals)) / float(counts.sum())


def bits_per_byte(loss: float, manifest: Manifest | None) -> float | None:
    """Return loss / ln 2 * tokens / bytes, with the tokens of the whole split and the bytes of its text in UTF-8.
    End-of-text tokens count: they stand for no byte, but their loss is part of what a document costs. For a part of the
    split this is an estimate, which assumes the split's bytes per token. Masked rows have none: how many bytes the
    tokens that count stand for is not known."""
    if manifest is None or manifest.bytes == 0 or manifest.row_length:
        return None
    return loss / math.log(2) * manifest.tokens / manifest.bytes
