"""The parts of the model that each device computes in its own way. The runtime chooses them once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from gpt2xla.config import ModelConfig, TrainConfig
from gpt2xla.errors import InputError
from gpt2xla.model.loss import plain_cross_entropy
from gpt2xla.model.norm import plain_layer_norm

Attention = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]
ProjectedAttention = Callable[[Tensor, Tensor, Tensor | None, int, Tensor | None], Tensor]
LogSums = Callable[[Tensor, Tensor, int], Tensor]


class Fused(NamedTuple):
    """Two of the `Kernels` below that go together, and what they are in words."""

    block: Callable[[Any, Any, Tensor | None], Any]
    layer_norm: Callable[..., Tensor]
    description: str


@dataclass(frozen=True)
class Kernels:
    """How the parts of the model are computed. Every choice computes the same function."""

    # (q, k, v, num_heads, documents) -> y, each (B, T, D). None means torch's own, the only one that supports dropout.
    # `documents` is None, or the starts of each token's document (B, T); for torch's own it is the mask made of them.
    attention: Attention | None = None
    # (x, weight and bias of c_attn, num_heads, documents) -> y; x and y are (B, T, D). It is attention together with the
    # projection before it, and takes the place of `attention`. None projects as `separate_qkv` says.
    projected_attention: ProjectedAttention | None = None
    # (x, head weight, labels, padding of the vocabulary) -> summed loss, as in `loss.py`
    cross_entropy: Callable[[Tensor, Tensor, Tensor, int], Tensor] = plain_cross_entropy
    # (x, head weight in the same type, padding) -> for each token (B, T) the logarithm of the sum of its exponentiated
    # logits, in fp32. Evaluations use it. None means torch's own.
    log_sums: LogSums | None = None
    layer_norm: Callable[[Tensor, nn.LayerNorm], Tensor] = plain_layer_norm  # (x, module) -> module(x)
    # Project queries, keys and values with three products instead of one. XLA then writes each of them in the layout that
    # attention reads, instead of copying the parts of a joint one.
    separate_qkv: bool = False
    head: Callable[[Tensor, Tensor], Tensor] = F.linear  # (x, head weight) -> logits
    static_shapes: bool = False  # whether each new shape costs a compile; if so, shapes must not follow a text's length
    # (block, x, kernels, documents) for full length; None calls the block itself
    compiled: Callable[..., Tensor] | None = None
    # (block, x, documents) -> x after the block; x may be of any type that `layer_norm` takes too. None means the block's
    # own lines.
    block: Callable[[Any, Any, Tensor | None], Any] | None = None
    checkpoint: Callable[..., Any] | None = None  # (block, x, ...), keeps only a block's input; None keeps everything
    description: str = "torch's own"  # for the summary at the start of a run


def choose_kernels(
    train: TrainConfig,
    model: ModelConfig,
    *,
    # What the device can compute beside `sdpa`, by the names of --attention: from queries, or from what is projected to them
    attention: dict[str, Attention],
    projected_attention: dict[str, ProjectedAttention] | None = None,
    preferred: str,  # the name of the attention that `auto` stands for, in models without dropout
    loss_chunks: int | None,  # into how many pieces --loss-chunks 0 cuts the loss; None computes it at once
    chunked_loss: Callable[..., Tensor],
    checkpoint: Callable[..., Any],
    log_sums: LogSums | None = None,
    layer_norm: Callable[[Tensor, nn.LayerNorm], Tensor] = plain_layer_norm,
    static_shapes: bool = False,
    compiled: Callable[..., Tensor] | None = None,
    fused: Fused | None = None,
) -> Kernels:
    """Return the kernels that the user asked for or, for options left at their defaults, those that the runtime prefers.

    Raises InputError if this device, or this model, cannot compute what --attention names."""
    name = train.attention if train.attention != "auto" else preferred if model.dropout == 0 else "sdpa"
    projected = projected_attention or {}
    if name not in ("sdpa", *attention, *projected):
        raise InputError(
            f"--attention {name} does not work on this device; use {', '.join(['auto', 'sdpa', *attention, *projected])}"
        )
    if name != "sdpa" and model.dropout > 0:
        raise InputError(f"--attention {name} does not support --dropout; use --attention sdpa, or --dropout 0")
    chunks = train.loss_chunks or loss_chunks
    pieces = f"loss in {chunks} {'piece' if chunks == 1 else 'pieces'}" if chunks else "loss at once"
    checkpointed = ", blocks computed twice" if train.activation_checkpointing == "block" else ""
    kind = ", blocks compiled" if compiled else f", {fused.description}" if fused else ""
    return Kernels(
        attention=attention.get(name),
        projected_attention=projected.get(name),
        cross_entropy=partial(chunked_loss, chunks=chunks) if chunks else plain_cross_entropy,
        log_sums=log_sums,
        layer_norm=fused.layer_norm if fused else layer_norm,
        separate_qkv=name in ("chunked", "flash"),
        static_shapes=static_shapes,
        compiled=compiled,
        block=fused.block if fused else None,
        checkpoint=checkpoint if train.activation_checkpointing == "block" else None,
        description=f"{name} attention, {pieces}{checkpointed}{kind}",
    )
