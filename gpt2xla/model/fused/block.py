"""The block itself, and the residual stream between blocks.

Shape suffixes: B sequences, T tokens, D d_model, F d_ff."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from gpt2xla.model.attention import sdpa_attention
from gpt2xla.model.fused.activation import activated
from gpt2xla.model.fused.add_norm import add_norm
from gpt2xla.model.fused.linear import linear, three_projections
from gpt2xla.model.gpt2 import Block


class Stream(NamedTuple):
    """A residual stream whose last sum, `x_BTD + y_BTD + bias_D`, the next layer norm will compute."""

    x_BTD: Tensor
    y_BTD: Tensor | None = None
    bias_D: Tensor | None = None


def fused_block(block: Block, stream: Tensor | Stream) -> Stream:
    """Compute the same as `block(stream)`, for a model without dropout."""
    attn, mlp = block.attn, block.mlp
    x_BTD, normed_BTD = _added(stream, block.ln_1)
    q_BTD, k_BTD, v_BTD = three_projections(normed_BTD, attn.c_attn.weight, attn.c_attn.bias)
    y_BTD = sdpa_attention(q_BTD, k_BTD, v_BTD, attn.num_heads)
    stream = Stream(x_BTD, linear(y_BTD, attn.c_proj.weight), attn.c_proj.bias)
    x_BTD, normed_BTD = _added(stream, block.ln_2)
    h_BTF = activated(linear(normed_BTD, mlp.c_fc.weight), mlp.c_fc.bias, mlp.activation)
    return Stream(x_BTD, linear(h_BTF, mlp.c_proj.weight), mlp.c_proj.bias)


def fused_layer_norm(stream: Tensor | Stream, norm: nn.LayerNorm) -> Tensor:
    """Return `norm` of the residual stream (B, T, D), in the type in which products compute."""
    return _added(stream, norm)[1]


def _added(stream: Tensor | Stream, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    if isinstance(stream, Tensor):
        stream = Stream(stream)
    return add_norm(*stream, norm.weight, norm.bias, norm.eps)
