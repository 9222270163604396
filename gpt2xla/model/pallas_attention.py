"""Causal attention as two TPU kernels, forward and backward, that keep all scores in the core's own memory.

One kernel call computes one sequence and the heads that lie side by side in 128 columns (two of GPT-2's), straight
from the layout (B, T, D) in which the projections write them, so nothing is transposed or padded in main memory.

Zeros separate the heads of a block, not slices: each head has a copy of k that is zero in the columns of the other heads, so
its products ignore them. The matrix units are 128 wide, so zeros cost nothing, and no columns are moved.
The formulas are those of Dao et al. 2022, FlashAttention. All keys of a sequence are in memory, so there is no running
maximum.

With documents, a chunk of queries is compiled for several numbers of keys. Where its first query's document starts decides
which of these runs, so keys that none of its queries sees cost nothing, and shapes stay fixed.

TPU v3 multiplies only fp32 operands (it rounds them to bf16 itself), and unpacks bf16 slowly; `Shape.bf16 = False` is for
it. Then the scratch memory has another type, and bf16 is read and written differently (`_rows`, `_write`).

Shape suffixes: T tokens, C queries of a chunk, S keys, L the 128 columns of a block, K columns of one head."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

COLUMNS = 128  # of a TPU's registers and matrix units
_MASKED = -1e30
# Queries, and the parts of keys that they may see; True for the one on the diagonal.
Chunk = tuple[slice, list[tuple[slice, bool]]]


@dataclass(frozen=True)
class Shape:
    """The shape of one call: B sequences of T tokens, H heads of K columns."""

    B: int
    T: int
    H: int
    K: int
    bf16: bool = True  # the products' operands are bf16; if not, they are fp32, as TPU v3 needs
    documents: bool = False  # attention stays within documents
    skips: bool = True  # keys of earlier documents; False serves to count the cycles of the longest way

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
        # Larger chunks compute more masked scores and need more memory; smaller ones fill v6e's matrix units less.
        return 256 if self.bf16 and self.T % 256 == 0 and self.T <= 1024 else 128

    @property
    def q_scale(self) -> float:
        """The part of 1 / sqrt(K) by which q is multiplied: all of it if it is a power of two, which rounds nothing."""
        return self.K**-0.5 if self.K in (16, 64, 256) else 1.0

    @property
    def score_scale(self) -> float:
        """The rest of 1 / sqrt(K), by which the fp32 scores are multiplied."""
        return self.K**-0.5 / self.q_scale

    @property
    def supported(self) -> bool:
        longest = 2048 if self.bf16 else 1024  # limited by the 16 MB of memory of most cores
        fits = longest >= self.T and self.T * self.heads_per_block <= 2 * longest
        return COLUMNS % self.K == 0 and self.K >= 32 and self.T % 128 == 0 and fits


def forward(shape: Shape, interpret: bool = False) -> Any:
    """Return the kernel (q, k, v) -> (y, log_sums). All are bf16 (B, T, D), except log_sums: the logarithm of the sum of
    each query's exponentiated scores, in fp32 (B, blocks, heads_per_block, T).

    With documents, two arguments come first, both int32: the `document_starts` of each chunk's first query (B, 1, chunks),
    and those of all queries (B, 1, T)."""
    scratch = "thhTi" if shape.documents else "thhT"
    return _call(shape, _forward, inputs="BBB", outputs="BS", scratch=scratch, products=2, interpret=interpret)


def backward(shape: Shape, joint: bool = True, interpret: bool = False) -> Any:
    """Return the kernel (q, k, v, y, log_sums, dy) -> (gradients, sums). With documents it takes the same two arguments
    first as `forward`.

    gradients: dq, dk and dv in one array, bf16 (3, B, T, D), or as three results if not `joint`. sums: fp32 (B, 3, D), these
    gradients before they are rounded, summed over a sequence's tokens, as biases need them."""
    outputs = "GM" if joint else "BBBM"
    return _call(
        shape, _backward, inputs="BBBBSB", outputs=outputs, scratch="hthtTTTx", products=5, interpret=interpret
    )


def _call(shape: Shape, body: Any, *, inputs: str, outputs: str, scratch: str, products: int, interpret: bool) -> Any:
    scores = shape.B * shape.H * sum(shape.queries_per_chunk * queries.stop for queries, _ in _chunks(shape))
    heads, blocks, chunks = shape.heads_per_block, shape.blocks, shape.T // shape.queries_per_chunk
    inputs = f"ND{inputs}" if shape.documents else inputs
    specs = {
        "B": pl.BlockSpec((1, shape.T, COLUMNS), lambda sequence, block: (sequence, 0, block)),
        "S": pl.BlockSpec((1, 1, heads, shape.T), lambda sequence, block: (sequence, block, 0, 0)),
        "G": pl.BlockSpec((3, 1, shape.T, COLUMNS), lambda sequence, block: (0, sequence, 0, block)),
        "M": pl.BlockSpec((1, 3, COLUMNS), lambda sequence, block: (sequence, 0, block)),
        # The starts of documents: numbers that branches are taken by, and vectors. TPU v3 has room for few numbers.
        "N": pl.BlockSpec((1, 1, chunks), lambda sequence, block: (sequence, 0, 0), memory_space=pltpu.SMEM),
        "D": pl.BlockSpec((1, 1, shape.T), lambda sequence, block: (sequence, 0, 0)),
    }
    arrays = {
        "B": jax.ShapeDtypeStruct((shape.B, shape.T, shape.D), jnp.bfloat16),
        "S": jax.ShapeDtypeStruct((shape.B, blocks, heads, shape.T), jnp.float32),
        "G": jax.ShapeDtypeStruct((3, shape.B, shape.T, shape.D), jnp.bfloat16),
        "M": jax.ShapeDtypeStruct((shape.B, 3, shape.D), jnp.float32),
        "N": jax.ShapeDtypeStruct((shape.B, 1, chunks), jnp.int32),
        "D": jax.ShapeDtypeStruct((shape.B, 1, shape.T), jnp.int32),
    }
    operand = jnp.bfloat16 if shape.bf16 else jnp.float32
    scratches = {
        "t": pltpu.VMEM((shape.T, COLUMNS), operand),
        "h": pltpu.VMEM((heads, shape.T, COLUMNS), operand),
        "x": pltpu.VMEM((COLUMNS, shape.T), operand),
        "T": pltpu.VMEM((shape.T, COLUMNS), jnp.float32),
        "i": pltpu.VMEM((shape.T, COLUMNS), jnp.int32),
    }
    call = pl.pallas_call(
        functools.partial(body, shape, interpret),
        grid=(shape.B, blocks),
        in_specs=[specs[kind] for kind in inputs],
        out_specs=[specs[kind] for kind in outputs],
        out_shape=[arrays[kind] for kind in outputs],
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * shape.K,
            transcendentals=scores,
            bytes_accessed=sum(arrays[kind].size * arrays[kind].dtype.itemsize for kind in inputs + outputs),
        ),
        scratch_shapes=[scratches[kind] for kind in scratch],
        interpret=interpret,
        name=f"gpt2xla_attention{body.__name__}",  # by which `tpu_check` knows it
    )

    def function(*args: jax.Array) -> Any:
        return call(*args)

    function.arguments = [arrays[kind] for kind in inputs]  # type: ignore[attr-defined]
    function.results = [arrays[kind] for kind in outputs]  # type: ignore[attr-defined]
    return function


def _forward(shape: Shape, interpret: bool, *refs: Any) -> None:
    numbers_ref, starts_ref, *refs = refs if shape.documents else (None, None, *refs)  # type: ignore[assignment]
    q_ref, k_ref, v_ref, y_ref, log_sum_ref, q, k, v, y, *starts = refs
    heads = range(shape.heads_per_block)
    if shape.documents:

        @pl.when(pl.program_id(1) == 0)
        def write_starts() -> None:  # one query's in each row
            starts[0][...] = jnp.broadcast_to(starts_ref[0], (COLUMNS, shape.T)).T

    for rows, (q_rows, k_rows, v_rows) in _rows(shape, interpret, q_ref, k_ref, v_ref):
        q[rows] = (q_rows * shape.q_scale).astype(q.dtype)
        for head in heads:
            k.at[head][rows] = _of_heads(shape, {head: k_rows}, 0.0).astype(k.dtype)
            # With ones in the columns of other heads, the product with v also sums the weights.
            v.at[head][rows] = _of_heads(shape, {head: v_rows}, 1.0).astype(v.dtype)

    def scores(step: Any) -> Any:
        queries, key_parts, head = step
        return [
            _scores(shape, q[queries], k[head, keys], 0, keys, diagonal, starts[0][queries] if starts else None)
            for keys, diagonal in key_parts
        ]

    def attend(chunks: list[Chunk]) -> None:
        steps = [(queries, key_parts, head) for queries, key_parts in chunks for head in heads]
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
            y_of[head] = sum(_product(w.astype(v.dtype), v[head, keys], 1, 0) for (keys, _), w in parts)
            sum_of[(head + 1) % len(heads)] = y_of[head]
            max_of[head] = max_C1
            if head == heads[-1]:
                if len(heads) > 1:
                    sums = pltpu.roll(_of_heads(shape, sum_of), COLUMNS - shape.K, 1)
                else:  # no columns are free
                    sums = sum(jnp.sum(w, axis=1, keepdims=True) for w in weights)
                y[queries] = _of_heads(shape, y_of) / sums
                _write(shape, y_ref, y, queries)
                log_sums = (_of_heads(shape, max_of) + jnp.log(sums)).T
                log_sum_ref[0, 0, :, queries] = jnp.concatenate(
                    [log_sums[h * shape.K : h * shape.K + 1] for h in heads]
                )

    if shape.documents:
        for chunk in _chunks(shape):
            _by_reach(shape, numbers_ref, chunk, lambda chunk: attend([chunk]))
    else:
        attend(_chunks(shape))


def _backward(shape: Shape, interpret: bool, *refs: Any) -> None:
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
            q.at[head][rows] = _of_heads(shape, {head: q_rows * shape.q_scale}, 0.0).astype(q.dtype)
            dy.at[head][rows] = _of_heads(shape, {head: dy_rows}, 0.0).astype(dy.dtype)
    k_LT[...] = k[...].astype(jnp.float32).T.astype(k.dtype)

    if shape.documents:
        dk[...] = dv[...] = jnp.zeros((shape.T, COLUMNS), jnp.float32)

    def differentiate(chunk: Chunk) -> None:
        queries, key_parts = chunk
        delta_LC = dq[queries].T
        dq_heads = []
        for head in heads:
            columns = slice(head * shape.K, (head + 1) * shape.K)
            log_sum_1C = log_sum_ref[0, 0, head : head + 1, queries]
            delta_1C = jnp.sum(delta_LC[columns], axis=0, keepdims=True)
            # Scores as (keys, queries) suit all products except the one for dq, and the statistics of a query are a row.
            parts = []
            for keys, diagonal in key_parts:
                starts_1C = starts_ref[0, :, queries] if shape.documents else None
                scores_SC = _scores(shape, k[keys], q[head, queries], 1, keys, diagonal, starts_1C)
                parts.append((keys, scores_SC, _product(v[keys], dy[head, queries], 1, 1)))
            dq_KC: Any = 0.0
            for keys, scores_SC, dweights_SC in parts:
                weights_SC = jnp.exp(scores_SC - log_sum_1C)
                dscores_SC = (weights_SC * (dweights_SC - delta_1C)).astype(q.dtype)
                dk_SL = _product(dscores_SC, q[head, queries], 1, 0)
                dv_SL = _product(weights_SC.astype(q.dtype), dy[head, queries], 1, 0)
                first = queries.stop == shape.T and head == 0 and not shape.documents
                dk[keys] = dk_SL if first else dk[keys] + dk_SL
                dv[keys] = dv_SL if first else dv[keys] + dv_SL
                dq_KC += _product(k_LT[columns, keys], dscores_SC, 1, 0)
            dq_heads.append(dq_KC * shape.K**-0.5)
        dq[queries] = jnp.concatenate(dq_heads).T

    # From the last queries to the first: then a chunk's keys have been seen by all their queries, and their gradients can be
    # written with the chunk.
    for chunk in reversed(_chunks(shape)):
        if shape.documents:
            _by_reach(shape, numbers_ref, chunk, differentiate)
        else:
            differentiate(chunk)
        queries, _ = chunk
        if shape.score_scale != 1:
            dk[queries] *= shape.score_scale
        dq_sum += _sum_of_rows(dq[queries])
        for ref, values in zip(gradient_refs, (dq, dk, dv), strict=True):
            _write(shape, ref, values, queries)
    sums_ref[0] = jnp.concatenate([dq_sum, dk_sum, dv_sum])


def _rows(shape: Shape, interpret: bool, *refs: Any) -> Any:
    """Return the rows of blocks in fp32, with the indices to write them to.

    On TPU v3 these are the even rows and then the odd ones: an even and an odd row share 32-bit words, which TPU v3 splits
    and scatters faster than it unpacks bf16. On other TPUs they are all rows at once."""

    def inside(x: jax.Array) -> jax.Array:
        # The last block may have fewer heads than the others; its other columns hold arbitrary values.
        column = jax.lax.broadcasted_iota(jnp.int32, (1, COLUMNS), 1) + pl.program_id(1) * COLUMNS
        return jnp.where(column < shape.D, x, 0.0) if shape.D % COLUMNS else x

    if shape.bf16:
        return [(slice(None), [inside(ref[0].astype(jnp.float32)) for ref in refs])]
    words = [pltpu.bitcast(ref[0], jnp.int32) if interpret else ref.bitcast(jnp.int32)[0] for ref in refs]

    def half_of(word: jax.Array, odd: int) -> jax.Array:
        return inside(jax.lax.bitcast_convert_type(word & -65536 if odd else word << 16, jnp.float32))

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


def _of_heads(shape: Shape, values: dict[int, Any], other: Any = None) -> Any:
    """Return each head's value in that head's columns. Columns of heads without a value hold `other`, or anything."""
    head_of_column = jax.lax.broadcasted_iota(jnp.int32, (1, COLUMNS), 1) // shape.K
    for head, value in values.items():
        is_alone = other is None or shape.heads_per_block == 1
        other = value if is_alone else jnp.where(head_of_column == head, value, other)
    return other


def _chunks(shape: Shape) -> list[Chunk]:
    """Return the queries of each chunk, with the keys that all of them see and the keys on the diagonal, marked True."""
    size = shape.queries_per_chunk
    return [
        (slice(a, a + size), [*([(slice(0, a), False)] if a else []), (slice(a, a + size), True)])
        for a in range(0, shape.T, size)
    ]


def _by_reach(shape: Shape, numbers_ref: Any, chunk: Chunk, work: Callable[[Chunk], None]) -> None:
    """Do `work` on the chunk with as few of its keys as its documents allow: those from one of a few places on."""
    queries, key_parts = chunk
    size, most = queries.stop - queries.start, queries.start
    # A document seldom starts just where a chunk does. Twice as many keys each time keep long sequences' programs short.
    reaches = [size << n for n in range(most.bit_length()) if size << n < most] if shape.skips else []
    start = numbers_ref[0, 0, most // size]
    later = None
    for reach in [*reaches, most]:
        first = most - reach
        parts = [(slice(max(keys.start, first), keys.stop), diagonal) for keys, diagonal in key_parts]
        if not reaches:
            work((queries, parts))
        else:
            is_needed = start >= first if later is None else (start >= first) & (start < later)
            pl.when(is_needed)(functools.partial(work, (queries, parts)))
        later = first


def _scores(
    shape: Shape, a: jax.Array, b: jax.Array, query_axis: int, keys: slice, diagonal: bool, starts: jax.Array | None
) -> jax.Array:
    """Return the scores of `keys`, with a large negative number where the query does not see the key. `starts`: of the
    queries' documents, in one row, or in each of 128 columns; None if there is one document."""
    scores = _product(a, b, 1, 1)
    if shape.score_scale != 1:
        scores *= shape.score_scale
    if not diagonal and starts is None:
        return scores
    query = jax.lax.broadcasted_iota(jnp.int32, scores.shape, query_axis)
    key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1 - query_axis)
    visible: Any = key <= query if diagonal else None
    if starts is not None:
        starts -= keys.start
        inside = key >= (starts if query_axis else jnp.concatenate([starts] * (scores.shape[1] // COLUMNS), axis=1))
        visible = inside if visible is None else visible & inside
    return jnp.where(visible, scores, _MASKED)


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
