"""Whether kernels compute on this device what torch's own operations do, found out on a small model at the start of a run.

No list of GPUs, drivers and versions of Triton on which they were right would be complete, and a wrong gradient shows
only in a loss that falls more slowly than it could."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from gpt2xla.config import ModelConfig
from gpt2xla.model.arithmetic import compute_dtype
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Kernels

# Enough for every kernel to have several programs, each with several rows and pieces, the last ones not full.
_SEQUENCES, _TOKENS, _IDS, _PADDING = 5, 257, 8200, 3


def allowed_error(dtype: torch.dtype, matmul_precision: str) -> float:
    """Return below what `largest_error` is rounding. Two right ways to round products in `dtype` differ by a tenth of it."""
    if dtype == torch.bfloat16 or (dtype == torch.float32 and matmul_precision != "highest"):  # perhaps in bf16, too
        return 1e-1
    return 3e-2 if dtype == torch.float16 else 1e-3


def largest_error(
    config: ModelConfig, kernels: Kernels, device: torch.device, autocast: Callable[[], AbstractContextManager[object]]
) -> float:
    """Return how far one block and its loss are from plain ones: of the gradients and the `log_sums` of `kernels`, the
    largest norm of a difference, relative to the norm of the plain one."""
    small = dataclasses.replace(
        config, num_layers=1, vocab_size=_IDS, vocab_padding=_PADDING, seq_length=_TOKENS, dropout=0.0
    )
    model = GPT2(small)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    ids = torch.randint(0, _IDS - _PADDING, (_SEQUENCES, _TOKENS + 1), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device)
    if isinstance(kernels.cross_entropy, partial):
        pieces = partial(kernels.cross_entropy.func, **{**kernels.cross_entropy.keywords, "chunks": 2})
        kernels = dataclasses.replace(kernels, cross_entropy=pieces)

    def results(kernels: Kernels) -> list[Tensor]:
        model.kernels = dataclasses.replace(kernels, compiled=None, checkpoint=None)
        with autocast():
            loss, _ = model(ids[:, :-1], ids[:, 1:])
        found = list(torch.autograd.grad(loss, list(model.parameters())))
        with torch.no_grad(), autocast():
            x_BTD = model.hidden(ids[:, :-1])
            if kernels.log_sums:
                found.append(kernels.log_sums(x_BTD.to(compute_dtype(x_BTD)), model.head_weight, _PADDING))
            else:
                found.append(model.logits(ids[:, :-1]).float().logsumexp(-1))
        return found

    pairs = zip(results(kernels), results(Kernels()), strict=True)
    return float(torch.stack([(found - plain).norm() / plain.norm() for found, plain in pairs]).max())
