"""Bias and activation of the feed-forward layers, and the gradient of both, in one kernel each way.

Shape suffixes: N tokens, F d_ff, P rows of the backward kernel's grid."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _TILE, _COLUMNS = 128, 8, 256  # of a program; the backward kernel leaves one sum over a program's rows


def activated(h: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return the activation, named as in `ModelConfig`, of `h + bias`, in the type of `h`: shapes (..., F) and (F,)."""
    return _Activated.apply(h, bias, activation)


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        h = h.contiguous()
        y = torch.empty_like(h)
        _launch(_forward, h, activation, h, bias, y)
        ctx.save_for_backward(h, bias)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, bias_F = ctx.saved_tensors
        width = h.shape[-1]
        dh = torch.empty_like(h)
        sums_PF = None
        if bias_F is not None:
            sums_PF = h.new_empty(triton.cdiv(h.numel() // width, _ROWS), width, dtype=torch.float32)
        _launch(_backward, h, ctx.activation, grads[0].contiguous(), h, bias_F, dh, sums_PF)
        return dh, None if sums_PF is None else sums_PF.sum(0), None


def _launch(kernel: Any, h: Tensor, activation: str, *arguments: Tensor | None) -> None:
    width = h.shape[-1]
    rows = h.numel() // width
    kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS))](
        *arguments, rows, F=width, KIND=activation, ROWS=_ROWS, TILE=_TILE, COLUMNS=_COLUMNS
    )


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    h, bias, y, rows,
    F: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_bias = tl.zeros((COLUMNS,), tl.float32)
    if bias is not None:
        column_bias = tl.load(bias + columns, columns < F, 0.0).to(tl.float32)
    for start in range(0, ROWS, TILE):
        row = start + tl.arange(0, TILE)[:, None]
        inside = (first + row < rows) & (columns < F)[None, :]
        at = row * F + columns[None, :]
        x = tl.load(h + first * F + at, inside, 0.0).to(tl.float32) + column_bias[None, :]
        tl.store(y + first * F + at, activate(x, KIND), inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dy, h, bias, dh, sums, rows,
    F: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_bias = tl.zeros((COLUMNS,), tl.float32)
    if bias is not None:
        column_bias = tl.load(bias + columns, columns < F, 0.0).to(tl.float32)
    total = tl.zeros((TILE, COLUMNS), tl.float32)
    for start in range(0, ROWS, TILE):
        row = start + tl.arange(0, TILE)[:, None]
        inside = (first + row < rows) & (columns < F)[None, :]
        at = row * F + columns[None, :]
        x = tl.load(h + first * F + at, inside, 0.0).to(tl.float32) + column_bias[None, :]
        out = tl.load(dy + first * F + at, inside, 0.0).to(tl.float32) * slope(x, KIND)
        tl.store(dh + first * F + at, out, inside)
        total += out
    if sums is not None:
        tl.store(sums + tl.program_id(0) * F + columns, tl.sum(total, 0), columns < F)


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
