"""The parts of the model that a device computes in its own way, chosen once by its runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gpt2xla.config import ModelConfig, TrainConfig
from gpt2xla.errors import InputError
from gpt2xla.model.loss import plain_cross_entropy
from gpt2xla.model.norm import plain_layer_norm

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Kernels:
    """Every choice computes the same function.

    Attributes:
        attention: (q, k, v, num_heads) -> y, each (B, T, D). None: torch's own, the one that knows dropout.
        cross_entropy: (x, head weight, labels, padding of the vocabulary) -> summed loss, as in `loss.py`.
        layer_norm: (x, module) -> module(x).
        separate_qkv: project queries, keys and values by three products instead of one. XLA then writes each in the layout
            that attention reads, where it would copy the parts of a joint one.
        head: (x, head weight) -> logits.
        static_shapes: whether each new shape costs a compile; then shapes must not follow a text's length.
        compiled: called as compiled(block, x, kernels) on sequences of full length; None calls the block itself.
        checkpoint: called as checkpoint(block, x, ...) to keep nothing of a block but its input; None keeps all.
        description: for the summary at start.
    """

    attention: Attention | None = None
    cross_entropy: Callable[[Tensor, Tensor, Tensor, int], Tensor] = plain_cross_entropy
    layer_norm: Callable[[Tensor, nn.LayerNorm], Tensor] = plain_layer_norm
    separate_qkv: bool = False
    head: Callable[[Tensor, Tensor], Tensor] = F.linear
    static_shapes: bool = False
    compiled: Callable[..., Tensor] | None = None
    checkpoint: Callable[..., Any] | None = None
    description: str = "torch's own"


def choose_kernels(
    train: TrainConfig,
    model: ModelConfig,
    *,
    attention: dict[str, Attention],
    preferred: str,
    loss_chunks: int | None,
    chunked_loss: Callable[..., Tensor],
    checkpoint: Callable[..., Any],
    layer_norm: Callable[[Tensor, nn.LayerNorm], Tensor] = plain_layer_norm,
    static_shapes: bool = False,
    compiled: Callable[..., Tensor] | None = None,
) -> Kernels:
    """What the user asked for, or else what the runtime prefers.

    Args:
        attention: by the names of --attention, what the device can compute beside `sdpa`.
        preferred, loss_chunks: the device's own choices, for options left alone; without chunks, the plain loss.
        chunked_loss: what computes the loss in chunks.

    Raises:
        InputError: --attention names something that this device, or this model, cannot do.
    """
    name = train.attention if train.attention != "auto" else preferred if model.dropout == 0 else "sdpa"
    if name != "sdpa" and name not in attention:
        raise InputError(
            f"--attention {name} does not work on this device; use auto, sdpa{''.join(', ' + n for n in attention)}"
        )
    if name != "sdpa" and model.dropout > 0:
        raise InputError(f"--attention {name} knows no --dropout; use --attention sdpa, or --dropout 0")
    chunks = train.loss_chunks or loss_chunks
    pieces = f"loss in {chunks} {'piece' if chunks == 1 else 'pieces'}" if chunks else "loss at once"
    checkpointed = ", blocks computed twice" if train.activation_checkpointing == "block" else ""
    compiles = ", blocks compiled" if compiled else ""
    return Kernels(
        attention=attention.get(name),
        cross_entropy=partial(chunked_loss, chunks=chunks) if chunks else plain_cross_entropy,
        layer_norm=layer_norm,
        separate_qkv=name in ("chunked", "flash"),
        static_shapes=static_shapes,
        compiled=compiled,
        checkpoint=checkpoint if train.activation_checkpointing == "block" else None,
        description=f"{name} attention, {pieces}{checkpointed}{compiles}",
    )
