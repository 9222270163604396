"""Bias and activation of the feed-forward layers, and the gradient of both, in one kernel each way.

Shape suffixes: N tokens, F d_ff, P rows of the backward kernel's grid."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # numbers per program in the forward kernel
_ROWS, _TILE, _COLUMNS = 128, 8, 256  # of a program in the backward kernel, which leaves one sum over its rows


def activated(h: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return the activation, named as in `ModelConfig`, of `h + bias`, in the type of `h`: shapes (..., F) and (F,)."""
    return _Activated.apply(h, bias, activation)


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        h = h.contiguous()
        y = torch.empty_like(h)
        _forward[(triton.cdiv(h.numel(), _BLOCK),)](h, bias, y, h.numel(), F=h.shape[-1], KIND=activation, BLOCK=_BLOCK)
        ctx.save_for_backward(h, bias)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, bias_F = ctx.saved_tensors
        width = h.shape[-1]
        rows = h.numel() // width
        dh = torch.empty_like(h)
        programs = triton.cdiv(rows, _ROWS)
        sums_PF = None if bias_F is None else h.new_empty(programs, width, dtype=torch.float32)
        _backward[(programs, triton.cdiv(width, _COLUMNS))](
            grads[0].contiguous(), h, bias_F, dh, sums_PF, rows,
            F=width, KIND=ctx.activation, ROWS=_ROWS, TILE=_TILE, COLUMNS=_COLUMNS,
        )  # fmt: skip
        return dh, None if sums_PF is None or bias_F is None else sums_PF.sum(0).to(bias_F.dtype), None


@triton.jit
def _forward(h, bias, y, size, F: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(h + at, inside, 0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + at % F, inside, 0.0).to(tl.float32)
    tl.store(y + at, activate(x, KIND), inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dy, h, bias, dh, sums, rows,
    F: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < F
    column_bias = tl.zeros((COLUMNS,), tl.float32)
    if bias is not None:
        column_bias = tl.load(bias + columns, within, 0.0).to(tl.float32)
    total = tl.zeros((TILE, COLUMNS), tl.float32)
    for start in range(0, ROWS, TILE):
        row = first + start + tl.arange(0, TILE)[:, None]
        inside = (row < rows) & within[None, :]
        at = row * F + columns[None, :]
        x = tl.load(h + at, inside, 0.0).to(tl.float32) + column_bias[None, :]
        out = tl.load(dy + at, inside, 0.0).to(tl.float32) * slope(x, KIND)
        tl.store(dh + at, out, inside)
        total += out
    if sums is not None:
        tl.store(sums + tl.program_id(0) * F + columns, tl.sum(total, 0), within)


@triton.jit
def activate(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation of fp32 numbers x."""
    if KIND == "relu":
        y = tl.maximum(x, 0.0)
    else:
        y = x * _share(x, KIND)
    return y


@triton.jit
def slope(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The derivative of the activation at x."""
    if KIND == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    else:
        share = _share(x, KIND)
        if KIND == "gelu-tanh":
            y = share + x * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * x * x)  # 3 * 0.044715
        else:
            y = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return y


@triton.jit
def _share(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """GELU(x) / x: the normal distribution function, or GPT-2's approximation of it, (1 + tanh(z)) / 2 = sigmoid(2 z)."""
    if KIND == "gelu-tanh":
        share = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))  # 2 * sqrt(2 / pi)
    else:
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # 1 / sqrt(2)
    return share
