"""Layer normalisation that keeps one number per activation for the backward pass, in the type the products compute in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpt2xla.model.arithmetic import Fence, compute_dtype, no_fence


def plain_layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return norm(x)


def lean_layer_norm(x: Tensor, norm: nn.LayerNorm, fence: Fence = no_fence) -> Tensor:
    """`norm(x)` over the last dimension, in the autocast type.

    torch's own keeps its input, in a bf16 run the fp32 residual stream, and the next product keeps the output beside it.
    Here the normalised input in bf16 stands for both.
    """
    return _LeanLayerNorm.apply(x, norm.weight, norm.bias, norm.eps, compute_dtype(x), fence)


class _LeanLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype, fence: Fence
    ) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
        normalised = (centred * scale).to(dtype)
        # Behind the fence only `normalised` is left to compute from: a compiler free to round less would keep x.
        fence([normalised])
        ctx.save_for_backward(normalised, scale, weight)
        ctx.has_bias = bias is not None
        y = normalised * weight
        return (y if bias is None else y + bias).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normalised, scale, weight = ctx.saved_tensors
        dy, normalised = grads[0].to(weight.dtype), normalised.to(weight.dtype)
        dnormalised = dy * weight
        along_normalised = normalised * (dnormalised * normalised).mean(-1, keepdim=True)
        dx = scale * (dnormalised - dnormalised.mean(-1, keepdim=True) - along_normalised)
        rows = tuple(range(dy.dim() - 1))
        return dx, (dy * normalised).sum(rows), dy.sum(rows) if ctx.has_bias else None, None, None, None
