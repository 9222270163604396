"""Products with a weight matrix, whose gradient the product itself leaves in fp32.

Shape suffixes: N tokens, D inputs, O outputs, P rows of the packing kernel's grid."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _TILE, _COLUMNS = 128, 8, 256  # of a program of the packing kernel, which leaves one sum over its rows


def linear(x: Tensor, weight_OD: Tensor) -> Tensor:
    """Return x W^T (..., O), in the type of `x`."""
    return _Linear.apply(x, weight_OD)


def three_projections(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three equal parts of x W^T + b, each (..., O / 3), in the type of `x`: queries, keys and values."""
    return _ThreeProjections.apply(x, weight_OD, bias_O)


def weight_gradient(dy_NO: Tensor, x_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """Return dy^T x (O, D) in `dtype`, without rounding sums to 16 bits on the way."""
    if dy_NO.dtype == dtype or not dy_NO.is_cuda:
        return dy_NO.t().to(dtype) @ x_ND.to(dtype)
    return torch.mm(dy_NO.t(), x_ND, out_dtype=dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OD: Tensor) -> Tensor:
        rounded_OD = weight_OD.to(x.dtype)
        ctx.save_for_backward(x, rounded_OD)
        ctx.dtype = weight_OD.dtype
        return F.linear(x, rounded_OD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight_OD = ctx.saved_tensors
        dy_NO, x_ND = grads[0].flatten(0, -2), x.flatten(0, -2)
        return (dy_NO @ weight_OD).view_as(x), weight_gradient(dy_NO, x_ND, ctx.dtype)


class _ThreeProjections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> tuple[Tensor, ...]:
        rounded_OD = weight_OD.to(x.dtype)
        ctx.save_for_backward(x, rounded_OD)
        ctx.dtype, ctx.has_bias = weight_OD.dtype, bias_O is not None
        return F.linear(x, rounded_OD, None if bias_O is None else bias_O.to(x.dtype)).chunk(3, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OD = ctx.saved_tensors
        dy_NO, dbias_O = _packed(*(grad.flatten(0, -2).contiguous() for grad in grads))
        dx, dweight_OD = (dy_NO @ weight_OD).view_as(x), weight_gradient(dy_NO, x.flatten(0, -2), ctx.dtype)
        return dx, dweight_OD, dbias_O if ctx.has_bias else None


def _packed(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return three matrices of one shape side by side, and the sum of their rows in fp32."""
    rows, width = a.shape
    programs = triton.cdiv(rows, _ROWS)
    packed_NO = a.new_empty(rows, 3 * width)
    sums_PO = a.new_empty(programs, 3 * width, dtype=torch.float32)
    _pack[(programs, triton.cdiv(width, _COLUMNS), 3)](
        a, b, c, packed_NO, sums_PO, rows, WIDTH=width, ROWS=_ROWS, TILE=_TILE, COLUMNS=_COLUMNS
    )
    return packed_NO, sums_PO.sum(0)


@triton.jit
def _pack(  # type: ignore[no-untyped-def]
    a, b, c, packed, sums, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    source = a
    if part == 1:
        source = b
    if part == 2:
        source = c
    total = tl.zeros((TILE, COLUMNS), tl.float32)
    for start in range(0, ROWS, TILE):
        row = start + tl.arange(0, TILE)[:, None]
        inside = (first + row < rows) & (columns < WIDTH)[None, :]
        value = tl.load(source + first * WIDTH + row * WIDTH + columns[None, :], inside, 0.0)
        tl.store(packed + first * 3 * WIDTH + (row * 3 + part) * WIDTH + columns[None, :], value, inside)
        total += value.to(tl.float32)
    tl.store(sums + (tl.program_id(0) * 3 + part) * WIDTH + columns, tl.sum(total, 0), columns < WIDTH)
