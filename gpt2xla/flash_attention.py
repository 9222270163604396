"""Causal attention as two TPU kernels, forward and backward, that keep all scores in the core's own memory.

Written in JAX's Pallas, and only lowered by JAX: `lower` returns a program that XLA embeds in a graph of any frontend.
One kernel call handles one sequence and the heads that lie side by side in 128 columns (two of GPT-2's), straight from
the layout (B, T, D) in which the projections write them, so nothing is transposed or padded in main memory.

Inside, scores stand as (keys, queries): sums over keys then run down the rows of a register, where they cost an addition
each, and the statistics of a query are a row that needs no transposing. The formulas are those of Dao et al. 2022,
FlashAttention; with all keys of a sequence at hand there is no running maximum.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

COLUMNS = 128  # of a TPU's registers and matrix units
_MASKED = -1e30


@dataclass(frozen=True)
class Shape:
    """Of one call: B sequences of T tokens, H heads of K columns."""

    B: int
    T: int
    H: int
    K: int

    @property
    def D(self) -> int:
        return self.H * self.K

    @property
    def heads_per_block(self) -> int:
        return COLUMNS // self.K

    @property
    def blocks(self) -> int:
        return -(-self.H // self.heads_per_block)

    @property
    def queries_per_chunk(self) -> int:
        return next(size for size in (512, 256, 128) if self.T % size == 0)

    @property
    def q_scale(self) -> float:
        """The part of 1 / sqrt(K) that q is multiplied by: all of it where it is a power of two, which rounds nothing."""
        return self.K**-0.5 if self.K in (16, 64, 256) else 1.0

    @property
    def score_scale(self) -> float:
        """The rest, for the scores in fp32."""
        return self.K**-0.5 / self.q_scale

    @property
    def supported(self) -> bool:
        return COLUMNS % self.K == 0 and self.K >= 32 and self.T % 128 == 0 and self.T <= 2048


def forward(shape: Shape, interpret: bool = False) -> Any:
    """(q, k, v) -> (y, log_sums): bf16 (B, T, D), and fp32 (B, blocks, heads_per_block, T), the log of the sum of
    exponentiated scores of each query."""
    return _call(shape, _forward, inputs="BBB", outputs="BS", products=2, interpret=interpret)


def backward(shape: Shape, interpret: bool = False) -> Any:
    """(q, k, v, y, log_sums, dy) -> (dq, dk, dv), all bf16 (B, T, D) but for log_sums."""
    return _call(shape, _backward, inputs="BBBBSB", outputs="BBB", products=5, interpret=interpret)


def lower(shape: Shape, kernel: Any) -> str:
    """`kernel` (forward or backward) as the payload of a `tpu_custom_call`. Runs on any machine; initialises no device."""
    use_libtpu_version()
    jax.config.update("jax_platforms", "cpu")  # or JAX would take the TPU away from torch_xla
    function = kernel(shape)
    text = str(jax.jit(function).trace(*function.arguments).lower(lowering_platforms=("tpu",)).compiler_ir())
    start = text.index('backend_config = "', text.index("@tpu_custom_call")) + len('backend_config = "')
    # MLIR escapes quotes as \22.
    payload = text[start : text.index('"', start)].replace("\\22", '"').replace("\\5C", "\\")
    json.loads(payload)
    return payload


def use_libtpu_version() -> None:
    """Write kernels in the version of their language that the libtpu of torch_xla 2.9 reads."""
    from jax._src import tpu_custom_call

    tpu_custom_call.get_ir_version = lambda *args: 7


def _call(shape: Shape, body: Any, *, inputs: str, outputs: str, products: int, interpret: bool) -> Any:
    scores = shape.B * shape.H * sum(shape.queries_per_chunk * queries.stop for queries, _ in _chunks(shape))
    heads, blocks = shape.heads_per_block, shape.blocks
    specs = {
        "B": pl.BlockSpec((1, shape.T, COLUMNS), lambda sequence, block: (sequence, 0, block)),
        "S": pl.BlockSpec((1, 1, heads, shape.T), lambda sequence, block: (sequence, block, 0, 0)),
    }
    arrays = {
        "B": jax.ShapeDtypeStruct((shape.B, shape.T, shape.D), jnp.bfloat16),
        "S": jax.ShapeDtypeStruct((shape.B, blocks, heads, shape.T), jnp.float32),
    }
    call = pl.pallas_call(
        functools.partial(body, shape),
        grid=(shape.B, blocks),
        in_specs=[specs[kind] for kind in inputs],
        out_specs=[specs[kind] for kind in outputs],
        out_shape=[arrays[kind] for kind in outputs],
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * shape.K,
            transcendentals=scores,
            bytes_accessed=sum(arrays[kind].size * arrays[kind].dtype.itemsize for kind in inputs + outputs),
        ),
        interpret=interpret,
    )

    def function(*args: jax.Array) -> Any:
        return call(*args)

    function.arguments = [arrays[kind] for kind in inputs]  # type: ignore[attr-defined]
    return function


def _forward(shape: Shape, q_ref: Any, k_ref: Any, v_ref: Any, y_ref: Any, log_sum_ref: Any) -> None:
    y_heads = []
    for head in range(shape.heads_per_block):
        columns = slice(head * shape.K, (head + 1) * shape.K)
        q_TK, k_TK, v_TK = q_ref[0, :, columns] * shape.q_scale, k_ref[0, :, columns], v_ref[0, :, columns]
        y_chunks, log_sums = [], []
        for queries, key_parts in _chunks(shape):
            scores = [_scores(shape, k_TK[keys], q_TK[queries], diagonal) for keys, diagonal in key_parts]
            max_1C = functools.reduce(jnp.maximum, (jnp.max(s, axis=0, keepdims=True) for s in scores))
            weights = [jnp.exp(s - max_1C) for s in scores]
            sum_1C = sum(jnp.sum(w, axis=0, keepdims=True) for w in weights)
            parts = zip(key_parts, weights, strict=True)
            y_KC = sum(_product(v_TK[keys], w.astype(jnp.bfloat16), 0, 0) for (keys, _), w in parts)
            y_chunks.append(y_KC / sum_1C)
            log_sums.append(max_1C + jnp.log(sum_1C))
        log_sum_ref[0, 0, head : head + 1, :] = jnp.concatenate(log_sums, axis=1)
        y_heads.append(jnp.concatenate(y_chunks, axis=1))
    y_ref[0] = jnp.concatenate(y_heads, axis=0).T.astype(jnp.bfloat16)


def _backward(
    shape: Shape, q_ref: Any, k_ref: Any, v_ref: Any, y_ref: Any, log_sum_ref: Any, dy_ref: Any, dq_ref: Any, dk_ref: Any,
    dv_ref: Any,
) -> None:  # fmt: skip
    chunk = shape.queries_per_chunk
    dq_heads = []
    for head in range(shape.heads_per_block):
        columns = slice(head * shape.K, (head + 1) * shape.K)
        q_TK, k_TK, v_TK = q_ref[0, :, columns] * shape.q_scale, k_ref[0, :, columns], v_ref[0, :, columns]
        dy_TK = dy_ref[0, :, columns]
        dy_y_TK = dy_TK.astype(jnp.float32) * y_ref[0, :, columns].astype(jnp.float32)
        dq_chunks: list[Any] = []
        dk_chunks: list[Any] = [0.0] * (shape.T // chunk)
        dv_chunks: list[Any] = [0.0] * (shape.T // chunk)
        for queries, key_parts in _chunks(shape):
            log_sum_1C = log_sum_ref[0, 0, head : head + 1, queries]
            delta_1C = jnp.sum(dy_y_TK[queries].T, axis=0, keepdims=True)
            dq_KC: Any = 0.0
            for keys, diagonal in key_parts:
                weights_SC = jnp.exp(_scores(shape, k_TK[keys], q_TK[queries], diagonal) - log_sum_1C)
                dweights_SC = _product(v_TK[keys], dy_TK[queries], 1, 1)
                dscores_SC = (weights_SC * (dweights_SC - delta_1C)).astype(jnp.bfloat16)
                dk_SK = _product(dscores_SC, q_TK[queries], 1, 0)
                dv_SK = _product(weights_SC.astype(jnp.bfloat16), dy_TK[queries], 1, 0)
                dq_KC += _product(k_TK[keys], dscores_SC, 0, 0)
                for first in range(keys.start, keys.stop, chunk):
                    rows = slice(first - keys.start, first - keys.start + chunk)
                    dk_chunks[first // chunk] += dk_SK[rows]
                    dv_chunks[first // chunk] += dv_SK[rows]
            dq_chunks.append(dq_KC * shape.K**-0.5)
        dq_heads.append(jnp.concatenate(dq_chunks, axis=1))
        dk_TK = jnp.concatenate(dk_chunks, axis=0) * shape.score_scale
        dk_ref[0, :, columns] = dk_TK.astype(jnp.bfloat16)
        dv_ref[0, :, columns] = jnp.concatenate(dv_chunks, axis=0).astype(jnp.bfloat16)
    dq_ref[0] = jnp.concatenate(dq_heads, axis=0).T.astype(jnp.bfloat16)


def _chunks(shape: Shape) -> list[tuple[slice, list[tuple[slice, bool]]]]:
    """The queries of each chunk; the keys all of them see; and the keys on the diagonal, marked True."""
    size = shape.queries_per_chunk
    return [
        (slice(a, a + size), [*([(slice(0, a), False)] if a else []), (slice(a, a + size), True)])
        for a in range(0, shape.T, size)
    ]


def _scores(shape: Shape, k_SK: jax.Array, q_CK: jax.Array, diagonal: bool) -> jax.Array:
    scores_SC = _product(k_SK, q_CK, 1, 1)
    if shape.score_scale != 1:
        scores_SC *= shape.score_scale
    if not diagonal:
        return scores_SC
    keys = jax.lax.broadcasted_iota(jnp.int32, scores_SC.shape, 0)
    queries = jax.lax.broadcasted_iota(jnp.int32, scores_SC.shape, 1)
    return jnp.where(keys <= queries, scores_SC, _MASKED)


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
