"""Token losses summed row by row, from which perplexity, its standard error and multiple choice are computed.

Shape suffixes: B sequences, T tokens, A alternative labels of a sequence, C tokens of a chunk, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2xla.data.windows import Batch
from gpt2xla.errors import RunFailed
from gpt2xla.logs.progress import Progress
from gpt2xla.model.arithmetic import compute_dtype
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import LogSums
from gpt2xla.model.loss import IGNORED_LABEL, LOGITS_AT_ONCE, logits_of_labels, mask_padding
from gpt2xla.runtime.base import Runtime
from gpt2xla.runtime.stop import Stop, Stopped

_LOGITS_AT_ONCE = LOGITS_AT_ONCE["xla"] // 4  # numbers in fp32


class RowLosses:
    """Runs the model, without training it, over batches of one shape: the first one compiles the step, later ones reuse it.

    A batch may hold A labels for each token, as the labels of A rows with the same input: its `labels` are (B, A * T), one
    row's after the other's, and the model reads the input once.

    Args:
        name: of the step, for runtimes that compile; batches of another shape need another RowLosses.
        stop: the stop request of the run, if it may interrupt the evaluation."""

    def __init__(self, model: GPT2, runtime: Runtime, name: str, stop: Stop | None = None) -> None:
        self.model, self.runtime, self.name, self.stop = model, runtime, name, stop
        self._step = runtime.compile_step(self._score, name)

    def of(self, batches: Iterable[Batch], progress: Progress) -> np.ndarray:
        """Return (rows, 2) in float64: the summed loss of each row in nats, and how many tokens it sums over; with A labels
        for each token, (rows * A, 2). Collective.

        The rows are those of all processes' `batches`; within a batch they come in the order of processes. `progress` counts
        the batches that the device has finished.

        Raises:
            Stopped: on all processes, when they have agreed to stop.
            RunFailed: on all processes, when a loss is NaN or infinite."""
        self._values: list[np.ndarray] = []
        self._progress = progress
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in self.runtime.device_batches(batches):
                self._step(batch)
                if self.stop and self.stop.agreed():
                    raise Stopped
            self.runtime.wait()
        finally:
            self.model.train(was_training)
        values = np.concatenate(self._values)
        if not np.isfinite(values).all():
            raise RunFailed(
                f"{self.name}: the loss is not a number: the weights hold NaN or infinity, or (with fp16) activations leave "
                "its range; choose an earlier checkpoint, or a lower --learning-rate"
            )
        return values

    @torch.no_grad()
    def _score(self, batch: Batch) -> None:
        with self.runtime.autocast():
            x_BTD, padding = self.model.hidden(batch.input_ids), self.model.config.vocab_padding
            head_VD, log_sums = self.model.head_weight, self.model.kernels.log_sums
            labels_BAT = batch.labels.unflatten(1, (-1, batch.input_ids.shape[1]))
            losses_BA = row_losses(x_BTD, head_VD, labels_BAT, padding, log_sums)
        counts_BA = (labels_BAT != IGNORED_LABEL).sum(2)
        values = torch.stack([losses_BA, counts_BA], dim=2).flatten()
        if self.stop:
            values, receive_stop = torch.cat([values, self.stop.requested()[None]]), self.stop.receiver()
        own = len(values)

        def ready(*values: float) -> None:
            of_processes = np.array(values).reshape(-1, own)
            if self.stop:
                receive_stop(of_processes[:, -1].sum())
                of_processes = of_processes[:, :-1]
            self._values.append(of_processes.reshape(-1, 2))
            self._progress.advance()

        self.runtime.when_ready(ready, self.runtime.gather_rows(values))


def row_losses(
    x_BTD: Tensor, weight_VD: Tensor, labels_BAT: Tensor, padding: int = 0, log_sums: LogSums | None = None
) -> Tensor:
    """Return the summed cross-entropy of each sequence with each of its labels (B, A), in nats and fp32; the last `padding`
    ids have no probability.

    A label's logit comes from the label's own row of the head. `log_sums`: see `Kernels`."""
    x_BTD = x_BTD.to(compute_dtype(x_BTD))
    weight_VD = weight_VD.to(x_BTD.dtype)
    label_logits_BAT = torch.stack([logits_of_labels(x_BTD, weight_VD, labels) for labels in labels_BAT.unbind(1)], 1)
    log_sums_B1T = (log_sums or _log_sums)(x_BTD, weight_VD, padding).unsqueeze(1)
    return torch.where(labels_BAT != IGNORED_LABEL, log_sums_B1T - label_logits_BAT, 0.0).sum(2)


def _log_sums(x_BTD: Tensor, weight_VD: Tensor, padding: int) -> Tensor:
    """Compute `Kernels.log_sums` in pieces along T."""
    chunks = min(-(-x_BTD.shape[:2].numel() * len(weight_VD) // _LOGITS_AT_ONCE), x_BTD.shape[1])
    logits = (F.linear(x_BCD, weight_VD).float() for x_BCD in x_BTD.chunk(chunks, dim=1))
    return torch.cat([mask_padding(logits_BCV, padding).logsumexp(-1) for logits_BCV in logits], dim=1)
