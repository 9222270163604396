"""The feed-forward layers with the activation inside a product: forward in the first one, backward in the gradient of the
second one. What the products leave is not read and written again for it.

torch's products are faster by themselves, so `block.py` uses this where it has been measured to be the faster way.
Shape suffixes: N tokens, D d_model, F d_ff, P rows of tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from gpt2xla.model.fused.activation import activate, slope
from gpt2xla.model.fused.linear import weight_gradient


class Tile(NamedTuple):
    """What a program of the kernel computes at a time, and with which resources."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = (Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3))
_ROWS_TOGETHER = (
    8  # tiles above each other that run before the next columns, so that they find operands in the L2 cache
)


def feed_forward(
    x: Tensor, fc_FD: Tensor, bias_F: Tensor | None, proj_DF: Tensor, activation: str, tile: Tile
) -> Tensor:
    """Return activation(x W_fc^T + b) W_proj^T (..., D), in the type of `x`; the activation is named as in `ModelConfig`."""
    return _FeedForward.apply(x, fc_FD, bias_F, proj_DF, activation, tile)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fc_FD: Tensor, bias_F: Tensor | None, proj_DF: Tensor, activation: str, tile: Tile
    ) -> Tensor:
        x_ND, rounded_fc_FD, rounded_proj_DF = x.flatten(0, -2).contiguous(), fc_FD.to(x.dtype), proj_DF.to(x.dtype)
        h_NF = x_ND.new_empty(len(x_ND), len(fc_FD))
        y_NF = torch.empty_like(h_NF)
        _launch(tile, x_ND, rounded_fc_FD.t(), h_NF, y_NF, activation, bias=bias_F)
        ctx.save_for_backward(x_ND, rounded_fc_FD, rounded_proj_DF, h_NF, y_NF)
        ctx.activation, ctx.tile, ctx.dtype, ctx.has_bias = activation, tile, fc_FD.dtype, bias_F is not None
        return F.linear(y_NF, rounded_proj_DF).view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, fc_FD, proj_DF, h_NF, y_NF = ctx.saved_tensors
        dy_ND = grads[0].flatten(0, -2).contiguous()
        dh_NF = torch.empty_like(h_NF)
        sums_PF = h_NF.new_empty(triton.cdiv(len(h_NF), ctx.tile.rows), len(fc_FD), dtype=torch.float32)
        _launch(ctx.tile, dy_ND, proj_DF, h_NF, dh_NF, ctx.activation, sums=sums_PF)
        return (
            (dh_NF @ fc_FD).view_as(grads[0]),
            weight_gradient(dh_NF, x_ND, ctx.dtype),
            sums_PF.sum(0) if ctx.has_bias else None,
            weight_gradient(dy_ND, y_NF, ctx.dtype),
            None,
            None,
        )


def _launch(
    tile: Tile, a: Tensor, b: Tensor, h: Tensor, out: Tensor, activation: str, bias: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:  # fmt: skip
    """Write `h` = a b + bias and `out` = activation(h). If there are `sums`, write `out` = a b * slope(h) and sums of it."""
    rows, depth = a.shape
    columns = b.shape[1]
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    _product[(programs,)](
        a, b, bias, h, out, sums, rows, *b.stride(), COLUMNS=columns, DEPTH=depth, KIND=activation, TOGETHER=_ROWS_TOGETHER,
        TILE_ROWS=tile.rows, TILE_COLUMNS=tile.columns, TILE_DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    a, b, bias, h, out, sums, rows, b_row, b_column, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, KIND: tl.constexpr,
    TOGETHER: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles_down, tiles_across = tl.cdiv(rows, TILE_ROWS), tl.cdiv(COLUMNS, TILE_COLUMNS)
    first_down = program // (TOGETHER * tiles_across) * TOGETHER
    together = min(tiles_down - first_down, TOGETHER)
    down = first_down + program % (TOGETHER * tiles_across) % together
    across = program % (TOGETHER * tiles_across) // together

    # Offsets within a tile are of 32 bits, which takes half as many registers.
    first = down.to(tl.int64) * TILE_ROWS
    row, column = tl.arange(0, TILE_ROWS), across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    step = tl.arange(0, TILE_DEPTH)
    last = (rows - 1 - first).to(tl.int32)
    # Beyond the last row and column these are read again, which needs no mask. The results are not stored.
    read = column
    if COLUMNS % TILE_COLUMNS != 0:
        read = tl.minimum(column, COLUMNS - 1)
    a_at = a + first * DEPTH + tl.minimum(row, last)[:, None] * DEPTH + step[None, :]
    b_at = b + step[:, None] * b_row + read[None, :] * b_column
    total = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    for start in range(0, DEPTH, TILE_DEPTH):
        if DEPTH % TILE_DEPTH == 0:
            a_tile, b_tile = tl.load(a_at), tl.load(b_at)
        else:
            a_tile = tl.load(a_at, (start + step < DEPTH)[None, :], 0.0)
            b_tile = tl.load(b_at, (start + step < DEPTH)[:, None], 0.0)
        total = tl.dot(a_tile, b_tile, total)
        a_at += TILE_DEPTH
        b_at += TILE_DEPTH * b_row

    inside = (row <= last)[:, None] & (column < COLUMNS)[None, :]
    at = row[:, None] * COLUMNS + column[None, :]
    h += first * COLUMNS
    out += first * COLUMNS
    if sums is None:
        if bias is not None:
            total += tl.load(bias + column, column < COLUMNS, 0.0).to(tl.float32)[None, :]
        rounded = total.to(h.dtype.element_ty)
        tl.store(h + at, rounded, inside)
        tl.store(out + at, activate(rounded.to(tl.float32), KIND), inside)
    else:
        total = tl.where(inside, total * slope(tl.load(h + at, inside, 0.0).to(tl.float32), KIND), 0.0)
        tl.store(out + at, total, inside)
        tl.store(sums + down * COLUMNS + column, tl.sum(total, 0), column < COLUMNS)
