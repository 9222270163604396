"""The block itself, and the residual stream between blocks.

Shape suffixes: B sequences, T tokens, D d_model, N = B * T."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpt2xla.config import ModelConfig
from gpt2xla.model.attention import sdpa_attention
from gpt2xla.model.fused.activation import activated
from gpt2xla.model.fused.add_norm import add_norm
from gpt2xla.model.fused.feed_forward import TILES, Tile, feed_forward
from gpt2xla.model.fused.linear import linear, three_projections
from gpt2xla.model.gpt2 import MLP, Block


class Stream(NamedTuple):
    """A residual stream whose last sum, `x_BTD + y_BTD + bias_D`, the next layer norm will compute."""

    x_BTD: Tensor
    y_BTD: Tensor | None = None
    bias_D: Tensor | None = None


def fused_block(
    block: Block, stream: Tensor | Stream, mask_B1TT: Tensor | None = None, tile: Tile | None = None
) -> Stream:
    """Compute the same as `block(stream)`, for a model without dropout. With a `tile` the activation is part of products."""
    attn, mlp = block.attn, block.mlp
    x_BTD, normed_BTD = _added(stream, block.ln_1)
    q_BTD, k_BTD, v_BTD = three_projections(normed_BTD, attn.c_attn.weight, attn.c_attn.bias)
    y_BTD = sdpa_attention(q_BTD, k_BTD, v_BTD, attn.num_heads, mask_B1TS=mask_B1TT)
    stream = Stream(x_BTD, linear(y_BTD, attn.c_proj.weight), attn.c_proj.bias)
    x_BTD, normed_BTD = _added(stream, block.ln_2)
    return Stream(x_BTD, feed_forward_layers(mlp, normed_BTD, tile), mlp.c_proj.bias)


def feed_forward_layers(mlp: MLP, x: Tensor, tile: Tile | None) -> Tensor:
    """Return `mlp(x)` without the bias of its last layer, with the activation in products if there is a `tile`."""
    if tile and x.element_size() == 2:  # other types would need twice the shared memory
        return feed_forward(x, mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.activation, tile)
    h = activated(linear(x, mlp.c_fc.weight), mlp.c_fc.bias, mlp.activation)
    return linear(h, mlp.c_proj.weight)


def fastest_tile(config: ModelConfig, x_ND: Tensor, seconds: Callable[..., float]) -> Tile | None:
    """Return the tile with which the feed-forward layers are fastest here, or None if they are without any.

    Args:
        x_ND: tokens to measure with, of 16-bit numbers.
        seconds: called with a function and its arguments, returns how long such a call takes."""
    mlp = MLP(config).to(x_ND.device)
    x_ND = x_ND.requires_grad_()

    def run(tile: Tile | None) -> None:
        torch.autograd.backward(feed_forward_layers(mlp, x_ND, tile), x_ND.detach())

    best, least = None, seconds(run, None)
    for tile in TILES:
        try:
            time = seconds(run, tile)
        except Exception:  # such as too little shared memory: each kind of GPU has its own reasons
            continue
        if time < 0.98 * least:
            best, least = tile, time
    return best


def fused_layer_norm(stream: Tensor | Stream, norm: nn.LayerNorm) -> Tensor:
    """Return `norm` of the residual stream (B, T, D), in the type in which products compute."""
    return _added(stream, norm)[1]


def _added(stream: Tensor | Stream, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    if isinstance(stream, Tensor):
        stream = Stream(stream)
    return add_norm(*stream, norm.weight, norm.bias, norm.eps)
