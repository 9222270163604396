"""The form of the attention kernels for TPU v5e and later, whose results are computed transposed.

The matrix units hold a square of one operand, 128 or 256 wide, and the rows of the other pass through it: a product costs
the number of these rows, however little of the square is in use. So products whose result has one head's columns are
computed transposed: 64 rows pass instead of 256. Scores sum over only a head's columns and fill the square badly either way:
zeros separate the heads of a block, so each head has a copy of q that is zero in the others' columns, and none are moved.

A chunk's keys are taken in parts of the same size. The compiler schedules nearly in a program's own order, so products of
later parts come before the exponentials of this one.

Shape suffixes: T tokens, C queries of a chunk, S keys, R some rows, L the 128 columns of a block, K columns of one head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gpt2xla.model.pallas_attention_shape import (
    COLUMNS,
    Shape,
    across,
    by_reach,
    columns_of,
    each_in_a_row,
    fewer_rows,
    of_heads,
    product,
    sum_of_rows,
    visible,
    within_width,
)

SCRATCH = {"forward": "htx", "backward": "hhxxxxXXT"}
STARTS_IN_ROWS = "backward"
_STEPS_AHEAD = 4  # by which the forward kernel's scores are computed before they are needed; more gains little


def forward(shape: Shape, interpret: bool, *refs: Any) -> None:
    numbers_ref, starts_ref, *refs = refs if shape.documents else (None, None, *refs)  # type: ignore[assignment]
    q_ref, k_ref, v_ref, y_ref, log_sum_ref, q, k, v_LT = refs
    heads = range(shape.heads_per_block)

    def prepare(rows: slice) -> None:
        q_RL, k_RL, v_RL = (_read(shape, ref, rows) for ref in (q_ref, k_ref, v_ref))
        for head in heads:
            q[head, rows] = of_heads(shape, {head: q_RL * shape.q_scale}, 0.0).astype(q.dtype)
        k[rows] = k_RL.astype(k.dtype)
        v_LT[:, rows] = v_RL.T.astype(v_LT.dtype)

    def scores(queries: slice, keys: slice, head: int) -> jax.Array:
        if keys.start == head == 0 and not shape.documents:
            prepare(queries)  # as late as that, so that it overlaps with earlier chunks
        starts_1C = starts_ref[0, :, queries] if shape.documents else None
        return visible(shape, product(k[keys], q[head, queries], 1, 1), 1, keys, keys == queries, starts_1C)

    def attend(chunks: list[tuple[slice, int]]) -> None:
        steps = [
            (queries, keys, head) for queries, first in chunks for keys in _parts(queries, first) for head in heads
        ]
        scores_ahead = [scores(*step) for step in steps[:_STEPS_AHEAD]]
        # Of each head: the largest score, the sum of the weights, and that of weights times v.
        state: dict[int, Any] = {}
        for number, (queries, keys, head) in enumerate(steps):
            scores_SC = scores_ahead.pop(0)
            if number + _STEPS_AHEAD < len(steps):
                scores_ahead.append(scores(*steps[number + _STEPS_AHEAD]))
            max_1C = jnp.max(fewer_rows(jnp.maximum, scores_SC), axis=0, keepdims=True)
            if head in state:
                max_1C = jnp.maximum(max_1C, state[head][0])
            weights_SC = jnp.exp(scores_SC - max_1C)
            sum_RC = fewer_rows(jnp.add, weights_SC)
            y_KC = product(v_LT[columns_of(shape, head), keys], weights_SC.astype(v_LT.dtype), 1, 0)
            if head in state:
                last_max_1C, last_sum_RC, last_y_KC = state[head]
                factor_1C = jnp.exp(last_max_1C - max_1C)
                sum_RC += last_sum_RC * factor_1C
                y_KC += last_y_KC * factor_1C
            state[head] = max_1C, sum_RC, y_KC
            if keys == queries and head == heads[-1]:
                y_LC = []
                for head, (max_1C, sum_RC, y_KC) in state.items():
                    sum_1C = jnp.sum(sum_RC, axis=0, keepdims=True)
                    log_sum_ref[0, 0, head : head + 1, queries] = max_1C + jnp.log(sum_1C)
                    y_LC.append(y_KC / sum_1C)
                _write(y_ref, queries, jnp.concatenate(y_LC).T)
                state = {}

    if shape.documents:
        prepare(slice(0, shape.T))
        for queries in shape.chunks:
            by_reach(shape, numbers_ref, queries, lambda queries, first: attend([(queries, first)]))
    else:
        attend([(queries, 0) for queries in shape.chunks])


def backward(shape: Shape, interpret: bool, *refs: Any) -> None:
    numbers_ref, starts_ref, *rest = refs if shape.documents else (None, None, *refs)
    starts = rest.pop() if shape.documents else None
    q_ref, k_ref, v_ref, y_ref, log_sum_ref, dy_ref, *gradient_refs, sums_ref = rest[:-9]
    q, dy, q_LT, dy_LT, k_LT, v_LT, dk_LT, dv_LT, delta = rest[-9:]
    if len(gradient_refs) == 1:
        gradient_refs = [gradient_refs[0].at[number] for number in range(3)]
    heads = range(shape.heads_per_block)
    # A bias of k adds the same to all scores of a query, which softmax does not see: the sum of dk stays zero.
    sums = sums_ref.at[0]
    sums[...] = jnp.zeros(sums.shape, sums.dtype)

    def prepare(rows: slice) -> None:
        q_RL, k_RL, v_RL, y_RL, dy_RL = (_read(shape, ref, rows) for ref in (q_ref, k_ref, v_ref, y_ref, dy_ref))
        k_LT[:, rows] = k_RL.T.astype(k_LT.dtype)
        v_LT[:, rows] = v_RL.T.astype(v_LT.dtype)
        for x_RL, x, x_LT in ((q_RL * shape.q_scale, q, q_LT), (dy_RL, dy, dy_LT)):
            for head in heads:
                x[head, rows] = of_heads(shape, {head: x_RL}, 0.0).astype(x.dtype)
            x_LT[:, rows] = x_RL.T.astype(x_LT.dtype)
        sums[2:] += sum_of_rows(dy_RL)  # of dv, too, as each query's weights sum to one
        delta[rows] = dy_RL * y_RL

    def products(queries: slice, keys: slice, head: int) -> tuple[jax.Array, jax.Array]:
        if queries.stop == shape.T and head == 0 and not shape.documents:
            prepare(keys)
        scores_CS = product(q[head, queries], k_LT[:, keys], 1, 0)
        dweights_CS = product(dy[head, queries], v_LT[:, keys], 1, 0)
        starts_CL = starts[queries] if starts is not None else None
        return visible(shape, scores_CS, 0, keys, keys == queries, starts_CL), dweights_CS

    def differentiate(chunks: list[tuple[slice, int]]) -> None:
        steps = [
            (queries, keys, head)
            for queries, first in chunks
            for head in heads
            for keys in reversed(_parts(queries, first))
        ]
        next_products = products(*steps[0])
        last: Any = None
        for number, (queries, keys, head) in enumerate(steps):
            scores_CS, dweights_CS = next_products
            if number + 1 < len(steps):
                next_products = products(*steps[number + 1])
            if keys == queries:
                log_sum_1C = log_sum_ref[0, 0, head : head + 1, queries]
                log_sum_CL = jnp.broadcast_to(log_sum_1C, (COLUMNS, log_sum_1C.shape[1])).T
                delta_C1 = jnp.sum(of_heads(shape, {head: delta[queries]}, 0.0), axis=1, keepdims=True)
            weights_CS = jnp.exp(scores_CS - across(log_sum_CL, scores_CS))
            dscores_CS = (weights_CS * (dweights_CS - delta_C1)).astype(q.dtype)
            if last:
                accumulate(*last)
            ends = number + 1 == len(steps) or steps[number + 1][0] != queries
            last = queries, keys, head, weights_CS.astype(q.dtype), dscores_CS, ends
        accumulate(*last)

    dq: dict[int, Any] = {}  # of each head, transposed

    def accumulate(queries: slice, keys: slice, head: int, weights_CS: Any, dscores_CS: Any, ends: bool) -> None:
        columns = columns_of(shape, head)
        dq_KC = product(k_LT[columns, keys], dscores_CS, 1, 1)
        dk_KS = product(q_LT[columns, queries], dscores_CS, 1, 0)
        is_first = queries.stop == shape.T and not shape.documents
        dk_LT[columns, keys] = dk_KS if is_first else dk_LT[columns, keys] + dk_KS
        dv_KS = product(dy_LT[columns, queries], weights_CS, 1, 0)
        dv_LT[columns, keys] = dv_KS if is_first else dv_LT[columns, keys] + dv_KS
        dq[head] = dq_KC if keys == queries else dq[head] + dq_KC
        if not ends:
            return
        dq_CL = jnp.concatenate([dq.pop(head) for head in heads]).T * shape.K**-0.5
        sums[:1] += sum_of_rows(dq_CL)
        gradients = dq_CL, dk_LT[:, queries].T * shape.score_scale, dv_LT[:, queries].T
        for ref, gradient_CL in zip(gradient_refs, gradients, strict=True):
            _write(ref, queries, gradient_CL)

    # From the last queries to the first: then a chunk's keys have been seen by all their queries, and their gradients can be
    # written with the chunk.
    chunks = shape.chunks[::-1]
    if starts is not None:

        @pl.when(pl.program_id(1) == 0)
        def write_starts() -> None:
            starts[...] = each_in_a_row(starts_ref)

        prepare(slice(0, shape.T))
        dk_LT[...] = dv_LT[...] = jnp.zeros((COLUMNS, shape.T), jnp.float32)
        for queries in chunks:
            by_reach(shape, numbers_ref, queries, lambda queries, first: differentiate([(queries, first)]))
    else:
        differentiate([(queries, 0) for queries in chunks])


def _parts(queries: slice, first: int) -> list[slice]:
    size = queries.stop - queries.start
    return [slice(start, start + size) for start in range(first, queries.stop, size)]


def _read(shape: Shape, ref: Any, rows: slice) -> jax.Array:
    return within_width(shape, ref[0, rows].astype(jnp.float32))


def _write(ref: Any, rows: slice, x_RL: jax.Array) -> None:
    ref[0, rows] = x_RL.astype(jnp.bfloat16)
