"""The form of the attention kernels for TPU v3 and v4, whose results lie in rows of 128 columns, as the arrays do.

Zeros separate the heads of a block, not slices: each head has a copy of k that is zero in the columns of the other heads, so
its products ignore them. The matrix units are 128 wide, so zeros cost nothing, and no columns are moved. All keys of a
sequence are in memory, so there is no running maximum.

TPU v3 multiplies only fp32 operands (it rounds them to bf16 itself), and unpacks bf16 slowly: there the scratch memory has
another type, and bf16 is read and written differently (`_rows`, `_write`).

Shape suffixes: T tokens, C queries of a chunk, S keys, L the 128 columns of a block, K columns of one head."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gpt2xla.model.pallas_attention_shape import (
    COLUMNS,
    Shape,
    by_reach,
    columns_of,
    each_in_a_row,
    of_heads,
    product,
    visible,
    within_width,
)

SCRATCH = {"forward": "thhT", "backward": "hthtTTTx"}
STARTS_IN_ROWS = "forward"


def forward(shape: Shape, interpret: bool, *refs: Any) -> None:
    numbers_ref, starts_ref, *refs = refs if shape.documents else (None, None, *refs)  # type: ignore[assignment]
    q_ref, k_ref, v_ref, y_ref, log_sum_ref, q, k, v, y, *starts = refs
    heads = range(shape.heads_per_block)
    if shape.documents:

        @pl.when(pl.program_id(1) == 0)
        def write_starts() -> None:
            starts[0][...] = each_in_a_row(starts_ref)

    for rows, (q_rows, k_rows, v_rows) in _rows(shape, interpret, q_ref, k_ref, v_ref):
        q[rows] = (q_rows * shape.q_scale).astype(q.dtype)
        for head in heads:
            k.at[head][rows] = of_heads(shape, {head: k_rows}, 0.0).astype(k.dtype)
            # With ones in the columns of other heads, the product with v also sums the weights.
            v.at[head][rows] = of_heads(shape, {head: v_rows}, 1.0).astype(v.dtype)

    def scores(step: Any) -> Any:
        queries, key_parts, head = step
        starts_CL = starts[0][queries] if starts else None
        return [
            visible(shape, product(q[queries], k[head, keys], 1, 1), 0, keys, keys == queries, starts_CL)
            for keys in key_parts
        ]

    def attend(chunks: list[tuple[slice, int]]) -> None:
        steps = [(queries, _parts(queries, first), head) for queries, first in chunks for head in heads]
        # The scheduler fills the wait for a maximum with the next step's product only if the product comes first.
        next_scores = scores(steps[0])
        y_of: dict[int, Any] = {}
        sum_of: dict[int, Any] = {}
        max_of: dict[int, Any] = {}
        for index, (queries, key_parts, head) in enumerate(steps):
            scores_CS, next_scores = next_scores, scores(steps[index + 1]) if index + 1 < len(steps) else None
            max_C1 = functools.reduce(jnp.maximum, (jnp.max(s, axis=1, keepdims=True) for s in scores_CS))
            weights = [jnp.exp(s - max_C1) for s in scores_CS]
            parts = zip(key_parts, weights, strict=True)
            y_of[head] = sum(product(w.astype(v.dtype), v[head, keys], 1, 0) for keys, w in parts)
            sum_of[(head + 1) % len(heads)] = y_of[head]
            max_of[head] = max_C1
            if head == heads[-1]:
                if len(heads) > 1:
                    sums = pltpu.roll(of_heads(shape, sum_of), COLUMNS - shape.K, 1)
                else:  # no columns are free
                    sums = sum(jnp.sum(w, axis=1, keepdims=True) for w in weights)
                y[queries] = of_heads(shape, y_of) / sums
                _write(shape, y_ref, y, queries)
                log_sums = (of_heads(shape, max_of) + jnp.log(sums)).T
                log_sum_ref[0, 0, :, queries] = jnp.concatenate(
                    [log_sums[h * shape.K : h * shape.K + 1] for h in heads]
                )

    if shape.documents:
        for queries in shape.chunks:
            by_reach(shape, numbers_ref, queries, lambda queries, first: attend([(queries, first)]))
    else:
        attend([(queries, 0) for queries in shape.chunks])


def backward(shape: Shape, interpret: bool, *refs: Any) -> None:
    numbers_ref, starts_ref, *refs = refs if shape.documents else (None, None, *refs)  # type: ignore[assignment]
    q_ref, k_ref, v_ref, y_ref, log_sum_ref, dy_ref, *gradient_refs, sums_ref, q, k, dy, v, dq, dk, dv, k_LT = refs
    if len(gradient_refs) == 1:
        gradient_refs = [gradient_refs[0].at[number] for number in range(3)]
    heads = range(shape.heads_per_block)
    # A bias of k adds the same to all scores of a query, which softmax does not see. Each query's weights sum to one, so
    # the sum of dv is the sum of dy.
    dq_sum, dk_sum, dv_sum = (jnp.zeros((1, COLUMNS), jnp.float32) for _ in range(3))
    for rows, (q_rows, k_rows, v_rows, y_rows, dy_rows) in _rows(shape, interpret, q_ref, k_ref, v_ref, y_ref, dy_ref):
        k[rows], v[rows] = k_rows.astype(k.dtype), v_rows.astype(v.dtype)
        dq[rows] = dy_rows * y_rows  # kept where dq will be written
        dv_sum += _sum_of_rows(dy_rows)
        for head in heads:
            q.at[head][rows] = of_heads(shape, {head: q_rows * shape.q_scale}, 0.0).astype(q.dtype)
            dy.at[head][rows] = of_heads(shape, {head: dy_rows}, 0.0).astype(dy.dtype)
    k_LT[...] = k[...].astype(jnp.float32).T.astype(k.dtype)

    if shape.documents:
        dk[...] = dv[...] = jnp.zeros((shape.T, COLUMNS), jnp.float32)

    def differentiate(queries: slice, first: int) -> None:
        delta_LC = dq[queries].T
        dq_heads = []
        for head in heads:
            columns = columns_of(shape, head)
            log_sum_1C = log_sum_ref[0, 0, head : head + 1, queries]
            delta_1C = jnp.sum(delta_LC[columns], axis=0, keepdims=True)
            # Scores as (keys, queries) suit all products except the one for dq, and the statistics of a query are a row.
            parts = []
            for keys in _parts(queries, first):
                starts_1C = starts_ref[0, :, queries] if shape.documents else None
                scores_SC = product(k[keys], q[head, queries], 1, 1)
                scores_SC = visible(shape, scores_SC, 1, keys, keys == queries, starts_1C)
                parts.append((keys, scores_SC, product(v[keys], dy[head, queries], 1, 1)))
            dq_KC: Any = 0.0
            for keys, scores_SC, dweights_SC in parts:
                weights_SC = jnp.exp(scores_SC - log_sum_1C)
                dscores_SC = (weights_SC * (dweights_SC - delta_1C)).astype(q.dtype)
                dk_SL = product(dscores_SC, q[head, queries], 1, 0)
                dv_SL = product(weights_SC.astype(q.dtype), dy[head, queries], 1, 0)
                is_first = queries.stop == shape.T and head == 0 and not shape.documents
                dk[keys] = dk_SL if is_first else dk[keys] + dk_SL
                dv[keys] = dv_SL if is_first else dv[keys] + dv_SL
                dq_KC += product(k_LT[columns, keys], dscores_SC, 1, 0)
            dq_heads.append(dq_KC * shape.K**-0.5)
        dq[queries] = jnp.concatenate(dq_heads).T

    # From the last queries to the first: then a chunk's keys have been seen by all their queries, and their gradients can be
    # written with the chunk.
    for queries in reversed(shape.chunks):
        by_reach(shape, numbers_ref, queries, differentiate)
        if shape.score_scale != 1:
            dk[queries] *= shape.score_scale
        dq_sum += _sum_of_rows(dq[queries])
        for ref, values in zip(gradient_refs, (dq, dk, dv), strict=True):
            _write(shape, ref, values, queries)
    sums_ref[0] = jnp.concatenate([dq_sum, dk_sum, dv_sum])


def _parts(queries: slice, first: int) -> list[slice]:
    """Return the keys that all queries of a chunk see, if there are any, and those on the diagonal."""
    return [slice(first, queries.start), queries] if first < queries.start else [queries]


def _rows(shape: Shape, interpret: bool, *refs: Any) -> Any:
    """Return the rows of blocks in fp32, with the indices to write them to.

    On TPU v3 these are the even rows and then the odd ones: an even and an odd row share 32-bit words, which TPU v3 splits
    and scatters faster than it unpacks bf16. On other TPUs they are all rows at once."""
    if shape.bf16:
        return [(slice(None), [within_width(shape, ref[0].astype(jnp.float32)) for ref in refs])]
    words = [pltpu.bitcast(ref[0], jnp.int32) if interpret else ref.bitcast(jnp.int32)[0] for ref in refs]

    def half_of(word: jax.Array, odd: int) -> jax.Array:
        return within_width(shape, jax.lax.bitcast_convert_type(word & -65536 if odd else word << 16, jnp.float32))

    return [(pl.ds(odd, shape.T // 2, stride=2), [half_of(word, odd) for word in words]) for odd in range(2)]


def _write(shape: Shape, ref: Any, values: Any, rows: slice) -> None:
    """Write some rows back as bf16, the inverse of `_rows`."""
    if shape.bf16:
        ref[0, rows] = values[rows].astype(jnp.bfloat16)
        return
    halves = [values[pl.ds(rows.start + odd, (rows.stop - rows.start) // 2, stride=2)] for odd in range(2)]
    even, odd = (jax.lax.bitcast_convert_type(half, jnp.int32) + 0x8000 for half in halves)
    ref[0, rows] = pltpu.bitcast(jax.lax.shift_right_logical(even, 16) | (odd & -65536), jnp.bfloat16)


def _sum_of_rows(x: jax.Array) -> jax.Array:
    while len(x) % 16 == 0:  # in halves, not one row after the other: each addition would wait for the last
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return jnp.sum(x, axis=0, keepdims=True)
