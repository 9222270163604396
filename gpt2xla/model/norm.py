"""Layer normalisation, plain or keeping only one number per activation for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpt2xla.model.arithmetic import Fence, compute_dtype, no_fence


def plain_layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Return `norm(x)` as torch computes it."""
    return norm(x)


def lean_layer_norm(x: Tensor, norm: nn.LayerNorm, fence: Fence = no_fence) -> Tensor:
    """Return `norm(x)` over the last dimension, in the type in which products compute.

    torch's own keeps its input, which in a bf16 run is the fp32 residual stream, and the next product keeps the output too.
    Here the normalised input in bf16 serves as both.

    Where it is of a smaller type than x, the variance is the mean square less the square of the mean. A compiler takes both
    means together with the product that writes x; the mean of (x - mean)^2 would read x once more. With 2^-24 of fp32 that
    loses 2^-24 (mean / standard deviation)^2 of the variance, which is nothing beside bf16 up to a ratio of 100. (In GPT-2's
    residual stream it is below 1: no loss depends on a row's mean, so nothing makes it grow.)"""
    normalised, scale = normalise(x.detach(), norm.eps, compute_dtype(x))
    # Behind the fence only `normalised` is left to compute from. Otherwise a compiler may keep x, to round less.
    fence([normalised])
    return denormalised(x, normalised, scale, norm)


def normalise(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the rows of x less their mean, over their standard deviation, in `dtype`, and what they were multiplied by."""
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    if dtype == x.dtype:
        variance = (centred * centred).mean(-1, keepdim=True)
    else:
        variance = ((x * x).mean(-1, keepdim=True) - mean * mean).clamp(min=0)
    scale = torch.rsqrt(variance + eps)
    return (centred * scale).to(dtype), scale


def denormalised(x: Tensor, normalised: Tensor, scale: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Return `norm(x)` in the type of `normalised`, given what `normalise` returned for x. The gradient is that of x."""
    return _Denormalised.apply(x, normalised, scale, norm.weight, norm.bias)


class _Denormalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, normalised: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(normalised, scale, weight)
        ctx.has_bias = bias is not None
        y = normalised * weight
        return (y if bias is None else y + bias).to(normalised.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normalised, scale, weight = ctx.saved_tensors
        dy, normalised = grads[0].to(weight.dtype), normalised.to(weight.dtype)
        dnormalised = dy * weight
        along_normalised = normalised * (dnormalised * normalised).mean(-1, keepdim=True)
        dx = scale * (dnormalised - dnormalised.mean(-1, keepdim=True) - along_normalised)
        rows = tuple(range(dy.dim() - 1))
        return dx, None, None, (dy * normalised).sum(rows), dy.sum(rows) if ctx.has_bias else None
