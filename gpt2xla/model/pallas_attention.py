"""Causal attention as two TPU kernels, forward and backward, that keep all scores in the core's own memory.

One kernel call computes one sequence and the heads that lie side by side in 128 columns (two of GPT-2's), straight
from the layout (B, T, D) in which the projections write them, so nothing is transposed or padded in main memory.
The formulas are those of Dao et al. 2022, FlashAttention.

The matrix units hold a square of one operand, 128 or 256 wide, and the rows of the other pass through it: a product costs
the number of these rows, however little of the square is in use. So products whose result has one head's columns are
computed transposed: 64 rows pass instead of 256. Scores sum over only a head's columns and fill the square badly either way:
zeros separate the heads of a block, so each head has a copy of q that is zero in the others' columns, and none are moved.
The compiler schedules nearly in a program's own order, so products of later steps come before the exponentials of this one.

With documents, a chunk of queries is compiled for several numbers of keys. Where its first query's document starts decides
which of these runs, so keys that none of its queries sees cost nothing, and shapes stay fixed.

TPU v3 multiplies only fp32 operands (it rounds them to bf16 itself), and unpacks bf16 slowly; `Shape.bf16 = False` is for
it. Then the scratch memory has another type, and bf16 is read and written differently (`_read`, `_write`).

Shape suffixes: T tokens, C queries of a chunk, S keys, R some rows, L the 128 columns of a block, K columns of one head."""

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
_STEPS_AHEAD = 4  # by which the forward kernel's scores are computed before they are needed; more gains little
# Queries, and the parts of the keys that they may see; the last part is on the diagonal.
Chunk = tuple[slice, list[slice]]


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
        # Larger chunks compute more masked scores; smaller ones make longer programs, and fill v6e's matrix units less.
        return 256 if self.bf16 and self.T % 256 == 0 else 128

    @property
    def in_pieces(self) -> bool:
        """Whether the compiler schedules each chunk on its own. TPU v3's memory does not hold what it keeps otherwise."""
        return self.documents or not self.bf16

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
    return _call(shape, _forward, inputs="BBB", outputs="BS", scratch="htxT", products=2, interpret=interpret)


def backward(shape: Shape, joint: bool = True, interpret: bool = False) -> Any:
    """Return the kernel (q, k, v, y, log_sums, dy) -> (gradients, sums). With documents it takes the same two arguments
    first as `forward`.

    gradients: dq, dk and dv in one array, bf16 (3, B, T, D), or as three results if not `joint`. sums: fp32 (B, 3, D), these
    gradients before they are rounded, summed over a sequence's tokens, as biases need them."""
    outputs, scratch = "GM" if joint else "BBBM", "hhxxxxXXTmi" if shape.documents else "hhxxxxXXTm"
    return _call(shape, _backward, inputs="BBBBSB", outputs=outputs, scratch=scratch, products=5, interpret=interpret)


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
        "X": pltpu.VMEM((COLUMNS, shape.T), jnp.float32),
        "m": pltpu.VMEM((3, COLUMNS), jnp.float32),
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
    q_ref, k_ref, v_ref, y_ref, log_sum_ref, q, k, v_LT, staging = refs
    heads = range(shape.heads_per_block)

    def prepare(rows: slice) -> None:
        q_RL, k_RL, v_RL = (_read(shape, interpret, ref, staging, rows) for ref in (q_ref, k_ref, v_ref))
        for head in heads:
            q[head, rows] = _of_heads(shape, {head: q_RL * shape.q_scale}, 0.0).astype(q.dtype)
        k[rows] = k_RL.astype(k.dtype)
        v_LT[:, rows] = v_RL.T.astype(v_LT.dtype)

    def scores(queries: slice, keys: slice, head: int) -> jax.Array:
        if keys.start == head == 0 and not shape.in_pieces:
            prepare(queries)  # as late as that, so that it overlaps with earlier chunks
        starts_1C = starts_ref[0, :, queries] if shape.documents else None
        return _visible(shape, _product(k[keys], q[head, queries], 1, 1), 1, queries, keys, starts_1C)

    def attend(chunks: list[Chunk]) -> None:
        steps = [(queries, keys, head) for queries, parts in chunks for keys in parts for head in heads]
        scores_ahead = [scores(*step) for step in steps[:_STEPS_AHEAD]]
        state: dict[
            int, Any
        ] = {}  # of each head: the largest score, the sum of the weights, and that of weights times v
        for number, (queries, keys, head) in enumerate(steps):
            scores_SC = scores_ahead.pop(0)
            if number + _STEPS_AHEAD < len(steps):
                scores_ahead.append(scores(*steps[number + _STEPS_AHEAD]))
            max_1C = jnp.max(_fewer_rows(jnp.maximum, scores_SC), axis=0, keepdims=True)
            if head in state:
                max_1C = jnp.maximum(max_1C, state[head][0])
            weights_SC = jnp.exp(scores_SC - max_1C)
            sum_RC = _fewer_rows(jnp.add, weights_SC)
            y_KC = _product(v_LT[_columns(shape, head), keys], weights_SC.astype(v_LT.dtype), 1, 0)
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
                _write(shape, y_ref, staging, queries, jnp.concatenate(y_LC).T)
                state = {}

    if shape.in_pieces:
        prepare(slice(0, shape.T))
        for chunk in _chunks(shape):
            _by_reach(shape, numbers_ref, chunk, lambda chunk: attend([chunk]))
    else:
        attend(_chunks(shape))


def _backward(shape: Shape, interpret: bool, *refs: Any) -> None:
    numbers_ref, starts_ref, *refs = refs if shape.documents else (None, None, *refs)  # type: ignore[assignment]
    scratch = 11 if shape.documents else 10
    q_ref, k_ref, v_ref, y_ref, log_sum_ref, dy_ref, *gradient_refs, sums_ref = refs[:-scratch]
    q, dy, q_LT, dy_LT, k_LT, v_LT, dk_LT, dv_LT, staging, sums, *starts = refs[-scratch:]
    if len(gradient_refs) == 1:
        gradient_refs = [gradient_refs[0].at[number] for number in range(3)]
    heads = range(shape.heads_per_block)
    # A bias of k adds the same to all scores of a query, which softmax does not see: the sum of dk stays zero.
    sums[...] = jnp.zeros_like(sums)

    def prepare(rows: slice) -> None:
        read = functools.partial(_read, shape, interpret, staging=staging, rows=rows)
        k_LT[:, rows] = read(k_ref).T.astype(k_LT.dtype)
        v_LT[:, rows] = read(v_ref).T.astype(v_LT.dtype)
        for ref, x, x_LT, scale in ((q_ref, q, q_LT, shape.q_scale), (dy_ref, dy, dy_LT, 1.0)):
            x_RL = read(ref) * scale
            for head in heads:
                x[head, rows] = _of_heads(shape, {head: x_RL}, 0.0).astype(x.dtype)
            x_LT[:, rows] = x_RL.T.astype(x_LT.dtype)
        sums[2:] += jnp.sum(
            _fewer_rows(jnp.add, x_RL), axis=0, keepdims=True
        )  # of dv, too, as each query's weights sum to one
        staging[rows] = x_RL * read(y_ref)

    def products(queries: slice, keys: slice, head: int) -> tuple[jax.Array, jax.Array]:
        if queries.stop == shape.T and head == 0 and not shape.in_pieces:
            prepare(keys)
        starts_CL = starts[0][queries] if shape.documents else None
        scores_CS = _product(q[head, queries], k_LT[:, keys], 1, 0)
        dweights_CS = _product(dy[head, queries], v_LT[:, keys], 1, 0)
        return _visible(shape, scores_CS, 0, queries, keys, starts_CL), dweights_CS

    def differentiate(chunks: list[Chunk]) -> None:
        steps = [(queries, keys, head) for queries, parts in chunks for head in heads for keys in reversed(parts)]
        next_products = products(*steps[0])
        last: Any = None
        for number, (queries, keys, head) in enumerate(steps):
            scores_CS, dweights_CS = next_products
            if number + 1 < len(steps):
                next_products = products(*steps[number + 1])
            if keys == queries:
                log_sum_1C = log_sum_ref[0, 0, head : head + 1, queries]
                log_sum_CL = jnp.broadcast_to(log_sum_1C, (COLUMNS, log_sum_1C.shape[1])).T
                delta_C1 = jnp.sum(_of_heads(shape, {head: staging[queries]}, 0.0), axis=1, keepdims=True)
            weights_CS = jnp.exp(scores_CS - _across(log_sum_CL, scores_CS))
            dscores_CS = (weights_CS * (dweights_CS - delta_C1)).astype(q.dtype)
            if last:
                accumulate(*last)
            ends = number + 1 == len(steps) or steps[number + 1][0] != queries
            last = queries, keys, head, weights_CS.astype(q.dtype), dscores_CS, ends
        accumulate(*last)

    dq: dict[int, Any] = {}  # of each head, transposed

    def accumulate(queries: slice, keys: slice, head: int, weights_CS: Any, dscores_CS: Any, ends: bool) -> None:
        columns = _columns(shape, head)
        dq_KC = _product(k_LT[columns, keys], dscores_CS, 1, 1)
        dk_KS = _product(q_LT[columns, queries], dscores_CS, 1, 0)
        first = queries.stop == shape.T and not shape.in_pieces
        dk_LT[columns, keys] = dk_KS if first else dk_LT[columns, keys] + dk_KS
        dv_KS = _product(dy_LT[columns, queries], weights_CS, 1, 0)
        dv_LT[columns, keys] = dv_KS if first else dv_LT[columns, keys] + dv_KS
        dq[head] = dq_KC if keys == queries else dq[head] + dq_KC
        if not ends:
            return
        dq_CL = jnp.concatenate([dq.pop(head) for head in heads]).T * shape.K**-0.5
        sums[:1] += jnp.sum(_fewer_rows(jnp.add, dq_CL), axis=0, keepdims=True)
        gradients = dq_CL, dk_LT[:, queries].T * shape.score_scale, dv_LT[:, queries].T
        for ref, gradient_CL in zip(gradient_refs, gradients, strict=True):
            _write(shape, ref, staging, queries, gradient_CL)

    # From the last queries to the first: then a chunk's keys have been seen by all their queries, and their gradients can be
    # written with the chunk.
    chunks = _chunks(shape)[::-1]
    if shape.documents:

        @pl.when(pl.program_id(1) == 0)
        def write_starts() -> None:  # one query's in each row
            starts[0][...] = jnp.broadcast_to(starts_ref[0], (COLUMNS, shape.T)).T

    if shape.in_pieces:
        prepare(slice(0, shape.T))
        dk_LT[...] = dv_LT[...] = jnp.zeros((COLUMNS, shape.T), jnp.float32)
        for chunk in chunks:
            _by_reach(shape, numbers_ref, chunk, lambda chunk: differentiate([chunk]))
    else:
        differentiate(chunks)
    sums_ref[0] = sums[...]


def _read(shape: Shape, interpret: bool, ref: Any, staging: Any, rows: slice) -> jax.Array:
    """Return some rows of a block in fp32. `staging`: scratch memory of the block's shape, in fp32, for TPU v3."""
    if shape.bf16:
        x_RL = ref[0, rows].astype(jnp.float32)
    else:
        # An even and an odd row share 32-bit words, which TPU v3 splits and scatters faster than it unpacks bf16.
        half = slice(rows.start // 2, rows.stop // 2)
        words = pltpu.bitcast(ref[0, rows], jnp.int32) if interpret else ref.bitcast(jnp.int32)[0, half]
        for odd in range(2):
            x = jax.lax.bitcast_convert_type(words & -65536 if odd else words << 16, jnp.float32)
            staging[pl.ds(rows.start + odd, half.stop - half.start, stride=2)] = x
        x_RL = staging[rows]
    # The last block may have fewer heads than the others; its other columns hold arbitrary values.
    column = jax.lax.broadcasted_iota(jnp.int32, (1, COLUMNS), 1) + pl.program_id(1) * COLUMNS
    return jnp.where(column < shape.D, x_RL, 0.0) if shape.D % COLUMNS else x_RL


def _write(shape: Shape, ref: Any, staging: Any, rows: slice, x_RL: jax.Array) -> None:
    """Write some rows of a block as bf16, the inverse of `_read`."""
    if shape.bf16:
        ref[0, rows] = x_RL.astype(jnp.bfloat16)
        return
    staging[rows] = x_RL
    halves = [staging[pl.ds(rows.start + odd, (rows.stop - rows.start) // 2, stride=2)] for odd in range(2)]
    even, odd = (jax.lax.bitcast_convert_type(half, jnp.int32) + 0x8000 for half in halves)
    ref[0, rows] = pltpu.bitcast(jax.lax.shift_right_logical(even, 16) | (odd & -65536), jnp.bfloat16)


def _fewer_rows(operation: Callable[[Any, Any], Any], x: jax.Array) -> jax.Array:
    """Reduce the rows of `x` to 32. To one at once would be a single chain of operations, each waiting for the last."""
    return functools.reduce(operation, [x[row : row + 32] for row in range(0, len(x), 32)])


def _across(x_CL: jax.Array, like: jax.Array) -> jax.Array:
    """Repeat 128 equal columns over the columns of `like`."""
    return jnp.concatenate([x_CL] * (like.shape[1] // COLUMNS), axis=1)


def _columns(shape: Shape, head: int) -> slice:
    return slice(head * shape.K, (head + 1) * shape.K)


def _of_heads(shape: Shape, values: dict[int, Any], other: Any = None) -> Any:
    """Return each head's value in that head's columns. Columns of heads without a value hold `other`, or anything."""
    head_of_column = jax.lax.broadcasted_iota(jnp.int32, (1, COLUMNS), 1) // shape.K
    for head, value in values.items():
        is_alone = other is None or shape.heads_per_block == 1
        other = value if is_alone else jnp.where(head_of_column == head, value, other)
    return other


def _chunks(shape: Shape) -> list[Chunk]:
    size = shape.queries_per_chunk
    chunks = [slice(start, start + size) for start in range(0, shape.T, size)]
    return [(queries, chunks[: number + 1]) for number, queries in enumerate(chunks)]


def _by_reach(shape: Shape, numbers_ref: Any, chunk: Chunk, work: Callable[[Chunk], None]) -> None:
    """Do `work` on the chunk with as few of its keys as its documents allow: those from one of a few places on."""
    queries, key_parts = chunk
    size, most = queries.stop - queries.start, queries.start
    if not shape.documents:
        pl.when(pl.program_id(0) >= 0)(functools.partial(work, chunk))  # always, but scheduled on its own
        return
    # A document seldom starts just where a chunk does. Twice as many keys each time keep long sequences' programs short.
    reaches = [size << n for n in range(most.bit_length()) if size << n < most] if shape.skips else []
    start = numbers_ref[0, 0, most // size]
    later = None
    for reach in [*reaches, most]:
        first = most - reach
        parts = [keys for keys in key_parts if keys.start >= first]
        if not reaches:
            work((queries, parts))
        else:
            is_needed = start >= first if later is None else (start >= first) & (start < later)
            pl.when(is_needed)(functools.partial(work, (queries, parts)))
        later = first


def _visible(
    shape: Shape, scores: jax.Array, query_axis: int, queries: slice, keys: slice, starts: jax.Array | None
) -> jax.Array:
    """Scale scores, and put a large negative number where the query does not see the key. `starts`: of the queries'
    documents, in one row, or in each of 128 columns; None if there is one document."""
    if shape.score_scale != 1:
        scores *= shape.score_scale
    if keys != queries and starts is None:
        return scores
    query = jax.lax.broadcasted_iota(jnp.int32, scores.shape, query_axis)
    key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1 - query_axis)
    visible: Any = key <= query if keys == queries else None
    if starts is not None:
        starts -= keys.start
        inside = key >= (starts if query_axis else _across(starts, scores))
        visible = inside if visible is None else visible & inside
    return jnp.where(visible, scores, _MASKED)


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
