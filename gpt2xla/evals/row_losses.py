"""Token losses summed row by row, from which perplexity, its standard error and multiple choice are computed.

Shape suffixes: B sequences, T tokens, A alternative last labels of a sequence, C tokens of a chunk, D d_model, V vocabulary.
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

    A batch may hold A alternatives of each sequence's last label, as A rows would that differ in nothing else: its `labels`
    are (B, T + A), the labels of the first of these rows, then the alternatives. The model reads the input once.

    Args:
        name: of the step, for runtimes that compile; batches of another shape need another RowLosses.
        stop: the stop request of the run, if it may interrupt the evaluation."""

    def __init__(self, model: GPT2, runtime: Runtime, name: str, stop: Stop | None = None) -> None:
        self.model, self.runtime, self.name, self.stop = model, runtime, name, stop
        self._step = runtime.compile_step(self._score, name)

    def of(self, batches: Iterable[Batch], progress: Progress) -> np.ndarray:
        """Return (rows, 2) in float64: the summed loss of each row in nats, and how many tokens it sums over; with A
        alternatives, (rows * A, 2). Collective.

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
            labels_BT, last_BA = batch.labels.tensor_split([batch.input_ids.shape[1]], dim=1)
            losses_BA = row_losses(x_BTD, head_VD, labels_BT, last_BA, padding, log_sums)
        counts_BA = (labels_BT != IGNORED_LABEL).sum(1, keepdim=True).expand_as(losses_BA)
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
    x_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    last_BA: Tensor | None = None,
    padding: int = 0,
    log_sums: LogSums | None = None,
) -> Tensor:
    """Return the summed cross-entropy of each sequence, in nats and fp32: with each alternative of its last label (B, A), or
    (B, 1) if there are none. The last `padding` ids have no probability.

    A label's logit comes from the label's own row of the head. `log_sums`: see `Kernels`."""
    x_BTD = x_BTD.to(compute_dtype(x_BTD))
    weight_VD = weight_VD.to(x_BTD.dtype)
    label_logits_BT = logits_of_labels(x_BTD, weight_VD, labels_BT)
    counted_BT = labels_BT != IGNORED_LABEL
    losses_BT = (log_sums or _log_sums)(x_BTD, weight_VD, padding) - label_logits_BT
    losses_B1 = torch.where(counted_BT, losses_BT, 0.0).sum(1, keepdim=True)
    if last_BA is None or last_BA.shape[1] == 0:
        return losses_B1
    places_T = torch.arange(labels_BT.shape[1], device=labels_BT.device)
    is_last_BT = counted_BT & (places_T == (counted_BT * places_T).amax(1, keepdim=True))
    # A sum of zeros and one number, which is exact, and which each device can make of its own sequences.
    x_B1D = torch.where(is_last_BT.unsqueeze(2), x_BTD, 0.0).sum(1, keepdim=True)
    last_logit_B1 = torch.where(is_last_BT, label_logits_BT, 0.0).sum(1, keepdim=True)
    return losses_B1 + last_logit_B1 - logits_of_labels(x_B1D, weight_VD, last_BA)


def _log_sums(x_BTD: Tensor, weight_VD: Tensor, padding: int) -> Tensor:
    """Compute `Kernels.log_sums` in pieces along T."""
    chunks = min(-(-x_BTD.shape[:2].numel() * len(weight_VD) // _LOGITS_AT_ONCE), x_BTD.shape[1])
    logits = (F.linear(x_BCD, weight_VD).float() for x_BCD in x_BTD.chunk(chunks, dim=1))
    return torch.cat([mask_padding(logits_BCV, padding).logsumexp(-1) for logits_BCV in logits], dim=1)
