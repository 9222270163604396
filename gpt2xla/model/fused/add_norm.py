"""The residual sum and the layer norm after it, in one kernel each way.

Backward, the same kernel also rounds the gradient for the products of the branch that was added, and sums it over tokens for
the branch's bias. Shape suffixes: N tokens, D d_model, P programs of the backward kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2xla.model.arithmetic import compute_dtype

# Of the backward kernel where a program has four warps. All run at once, four on each multiprocessor of an H100, and each
# leaves one sum over its tokens.
PROGRAMS = 528


def add_norm(
    x: Tensor, y: Tensor | None, y_bias: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the sum `x + y + y_bias`, in the type of `x`, and its layer norm, in the type in which products compute.

    `x` and `y` are of shape (..., D), all others (D,); `y` and `y_bias` may be None."""
    return _AddNorm.apply(x, y, y_bias, weight, bias, eps, compute_dtype(x))


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, y_bias: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        total = x.view_as(x) if y is None else torch.empty_like(x)
        normed = torch.empty_like(x, dtype=dtype)
        mean_N, scale_N = x.new_empty(2, rows, dtype=torch.float32)
        _forward[(rows,)](
            x, None if y is None else y.contiguous(), y_bias, weight, bias, total, normed, mean_N, scale_N, eps,
            D=width, BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
        )  # fmt: skip
        ctx.save_for_backward(total, mean_N, scale_N, weight)
        ctx.y_dtype, ctx.has_y_bias, ctx.has_bias = None if y is None else y.dtype, y_bias is not None, bias is not None
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, mean_N, scale_N, weight_D = ctx.saved_tensors
        dtotal, dnormed = grads
        assert dnormed is not None, "the output head reads every block"
        rows, width = len(mean_N), total.shape[-1]
        programs = min(rows, PROGRAMS * 4 // _warps(width))
        dx = torch.empty_like(total)
        dy = None if ctx.y_dtype is None else torch.empty_like(total, dtype=ctx.y_dtype)
        sums_P3D = total.new_empty(programs, 3, width, dtype=torch.float32)
        _backward[(programs,)](
            None if dtotal is None else dtotal.contiguous(), dnormed.contiguous(), total, mean_N, scale_N, weight_D,
            dx, dy, sums_P3D, rows,
            D=width, BLOCK=triton.next_power_of_2(width), ROWS=triton.cdiv(rows, programs), num_warps=_warps(width),
        )  # fmt: skip
        dweight_D, dbias_D, dy_bias_D = sums_P3D.sum(0)
        return (
            dx, dy, dy_bias_D if ctx.has_y_bias else None, dweight_D, dbias_D if ctx.has_bias else None, None, None,
        )  # fmt: skip


def _warps(width: int) -> int:
    return min(max(triton.next_power_of_2(width) // 256, 4), 16)


@triton.jit
def _forward(x, y, y_bias, weight, bias, total, normed, mean, scale, eps, D: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    sums = tl.load(x + row * D + columns, inside, 0.0).to(tl.float32)
    if y is not None:
        sums += tl.load(y + row * D + columns, inside, 0.0).to(tl.float32)
        if y_bias is not None:
            sums += tl.load(y_bias + columns, inside, 0.0).to(tl.float32)
        tl.store(total + row * D + columns, sums, inside)
    row_mean = tl.sum(sums, 0) / D
    centred = tl.where(inside, sums - row_mean, 0.0)
    row_scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    out = centred * row_scale * tl.load(weight + columns, inside, 0.0)
    if bias is not None:
        out += tl.load(bias + columns, inside, 0.0)
    tl.store(normed + row * D + columns, out, inside)
    tl.store(mean + row, row_mean)
    tl.store(scale + row, row_scale)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dtotal, dnormed, total, mean, scale, weight, dx, dy, sums, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    row_weight = tl.load(weight + columns, columns < D, 0.0)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    dy_bias = tl.zeros((BLOCK,), tl.float32)
    for step in range(ROWS):
        row = program + step * tl.num_programs(0)
        inside = (columns < D) & (row < rows)
        d = tl.load(dnormed + row * D + columns, inside, 0.0).to(tl.float32)
        value = tl.load(total + row * D + columns, inside, 0.0).to(tl.float32)
        row_scale = tl.load(scale + row, row < rows, 0.0)
        normalised = tl.where(inside, (value - tl.load(mean + row, row < rows, 0.0)) * row_scale, 0.0)
        dweight += d * normalised
        dbias += d
        d *= row_weight
        along = tl.sum(d * normalised, 0) / D
        out = row_scale * (d - tl.sum(d, 0) / D - normalised * along)
        if dtotal is not None:
            out += tl.load(dtotal + row * D + columns, inside, 0.0).to(tl.float32)
        tl.store(dx + row * D + columns, out, inside)
        if dy is not None:
            tl.store(dy + row * D + columns, out, inside)
            dy_bias += tl.where(inside, out, 0.0)
    here = sums + program * 3 * D + columns
    tl.store(here, dweight, columns < D)
    tl.store(here + D, dbias, columns < D)
    tl.store(here + 2 * D, dy_bias, columns < D)
