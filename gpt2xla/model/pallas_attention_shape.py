"""The shape of one call of the attention kernels, and the steps that both of their forms share.

Shape suffixes: T tokens, C queries of a chunk, S keys, L the 128 columns of a block, K columns of one head."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

COLUMNS = 128  # of a TPU's registers and matrix units
_MASKED = -1e30


@dataclass(frozen=True)
class Shape:
    """The shape of one call: B sequences of T tokens, H heads of K columns, and what the device calls itself."""

    B: int
    T: int
    H: int
    K: int
    device_kind: str = "TPU v6 lite"
    documents: bool = False  # attention stays within documents
    skips: bool = True  # keys of earlier documents; False serves to count the cycles of the longest way

    @property
    def bf16(self) -> bool:
        """Whether the operands of products are bf16; if not, they are fp32, as TPU v3 needs."""
        return not self.device_kind.startswith("TPU v3")

    @property
    def transposed(self) -> bool:
        """Which form it is. By compiling both, transposed takes 15% fewer cycles on v5e, v5p and v6e, and 5% more on v4. On
        v3 it needs 25 MiB of fast memory, and there are 16."""
        return not self.device_kind.startswith(("TPU v3", "TPU v4"))

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
        return 256 if self.bf16 and self.T % 256 == 0 and (self.transposed or self.T <= 1024) else 128

    @property
    def chunks(self) -> list[slice]:
        size = self.queries_per_chunk
        return [slice(start, start + size) for start in range(0, self.T, size)]

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


def by_reach(shape: Shape, numbers_ref: Any, queries: slice, work: Callable[[slice, int], None]) -> None:
    """Do `work` on a chunk of queries and its first key: the last of a few that leaves out nothing of its documents. Without
    documents that is 0."""
    size, most = queries.stop - queries.start, queries.start
    # A document seldom starts just where a chunk does. Twice as many keys each time keep long sequences' programs short.
    doubled = [size << n for n in range(most.bit_length()) if size << n < most]
    reaches = doubled if shape.documents and shape.skips else []
    if not reaches:
        work(queries, 0)
        return
    start = numbers_ref[0, 0, most // size]
    later = None
    for reach in [*reaches, most]:
        first = most - reach
        is_needed = start >= first if later is None else (start >= first) & (start < later)
        pl.when(is_needed)(functools.partial(work, queries, first))
        later = first


def visible(
    shape: Shape, scores: jax.Array, query_axis: int, keys: slice, diagonal: bool, starts: jax.Array | None
) -> jax.Array:
    """Scale the scores of `keys`, and put a large negative number where the query does not see the key. `starts`: of the
    queries' documents, in one row, or in each of 128 columns; None if there is one document."""
    if shape.score_scale != 1:
        scores *= shape.score_scale
    if not diagonal and starts is None:
        return scores
    query = jax.lax.broadcasted_iota(jnp.int32, scores.shape, query_axis)
    key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1 - query_axis)
    seen: Any = key <= query if diagonal else None
    if starts is not None:
        starts -= keys.start
        inside = key >= (starts if query_axis else across(starts, scores))
        seen = inside if seen is None else seen & inside
    return jnp.where(seen, scores, _MASKED)


def across(x_CL: jax.Array, like: jax.Array) -> jax.Array:
    """Repeat 128 equal columns over the columns of `like`."""
    return jnp.concatenate([x_CL] * (like.shape[1] // COLUMNS), axis=1)


def each_in_a_row(starts_ref: Any) -> jax.Array:
    """Return the starts of the queries' documents, a row of 128 equal numbers for each query."""
    return jnp.broadcast_to(starts_ref[0], (COLUMNS, starts_ref.shape[2])).T


def of_heads(shape: Shape, values: dict[int, Any], other: Any = None) -> Any:
    """Return each head's value in that head's columns. Columns of heads without a value hold `other`, or anything."""
    head_of_column = jax.lax.broadcasted_iota(jnp.int32, (1, COLUMNS), 1) // shape.K
    for head, value in values.items():
        is_alone = other is None or shape.heads_per_block == 1
        other = value if is_alone else jnp.where(head_of_column == head, value, other)
    return other


def within_width(shape: Shape, x: jax.Array) -> jax.Array:
    """Put zeros where a block reaches beyond the arrays: the last one may have fewer heads than the others, and its other
    columns hold arbitrary values."""
    column = jax.lax.broadcasted_iota(jnp.int32, (1, COLUMNS), 1) + pl.program_id(1) * COLUMNS
    return jnp.where(column < shape.D, x, 0.0) if shape.D % COLUMNS else x


def columns_of(shape: Shape, head: int) -> slice:
    return slice(head * shape.K, (head + 1) * shape.K)


def fewer_rows(operation: Callable[[Any, Any], Any], x: jax.Array) -> jax.Array:
    """Reduce the rows of `x` to 32. To one at once would be a single chain of operations, each waiting for the last."""
    return functools.reduce(operation, [x[row : row + 32] for row in range(0, len(x), 32)])


def sum_of_rows(x: jax.Array) -> jax.Array:
    return jnp.sum(fewer_rows(jnp.add, x), axis=0, keepdims=True)


def product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
