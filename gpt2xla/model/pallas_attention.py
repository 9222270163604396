"""Causal attention as two TPU kernels, forward and backward, that keep all scores in the core's own memory.

One kernel call computes one sequence and the heads that lie side by side in 128 columns (two of GPT-2's), straight
from the layout (B, T, D) in which the projections write them, so nothing is transposed or padded in main memory.
The formulas are those of Dao et al. 2022, FlashAttention.

The kernels have two forms, of which `Shape.transposed` chooses by the device: `pallas_attention_transposed.py`, and
`pallas_attention_rows.py` for TPU v3 and v4.

With documents, a chunk of queries is compiled for several numbers of keys. Where its first query's document starts decides
which of these runs, so keys that none of its queries sees cost nothing, and shapes stay fixed.

Shape suffixes: B sequences, T tokens, D d_model."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gpt2xla.model import pallas_attention_rows as rows
from gpt2xla.model import pallas_attention_transposed as transposed
from gpt2xla.model.pallas_attention_shape import COLUMNS, Shape


def forward(shape: Shape, interpret: bool = False) -> Any:
    """Return the kernel (q, k, v) -> (y, log_sums). All are bf16 (B, T, D), except log_sums: the logarithm of the sum of
    each query's exponentiated scores, in fp32 (B, blocks, heads_per_block, T).

    With documents, two arguments come first, both int32: the `document_starts` of each chunk's first query (B, 1, chunks),
    and those of all queries (B, 1, T)."""
    return _call(shape, "forward", inputs="BBB", outputs="BS", products=2, interpret=interpret)


def backward(shape: Shape, joint: bool = True, interpret: bool = False) -> Any:
    """Return the kernel (q, k, v, y, log_sums, dy) -> (gradients, sums). With documents it takes the same two arguments
    first as `forward`.

    gradients: dq, dk and dv in one array, bf16 (3, B, T, D), or as three results if not `joint`. sums: fp32 (B, 3, D), these
    gradients before they are rounded, summed over a sequence's tokens, as biases need them."""
    outputs = "GM" if joint else "BBBM"
    return _call(shape, "backward", inputs="BBBBSB", outputs=outputs, products=5, interpret=interpret)


def _call(shape: Shape, direction: str, *, inputs: str, outputs: str, products: int, interpret: bool) -> Any:
    scores = shape.B * shape.H * sum(shape.queries_per_chunk * queries.stop for queries in shape.chunks)
    heads, blocks, chunks = shape.heads_per_block, shape.blocks, len(shape.chunks)
    form = transposed if shape.transposed else rows
    scratch = form.SCRATCH[direction] + "i" * (shape.documents and direction == form.STARTS_IN_ROWS)
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
    scratches = {  # of one block's rows, of one copy for each head, and transposed; in capitals fp32
        "t": pltpu.VMEM((shape.T, COLUMNS), operand),
        "h": pltpu.VMEM((heads, shape.T, COLUMNS), operand),
        "x": pltpu.VMEM((COLUMNS, shape.T), operand),
        "T": pltpu.VMEM((shape.T, COLUMNS), jnp.float32),
        "X": pltpu.VMEM((COLUMNS, shape.T), jnp.float32),
        "i": pltpu.VMEM((shape.T, COLUMNS), jnp.int32),
    }
    call = pl.pallas_call(
        functools.partial(getattr(form, direction), shape, interpret),
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
        name=f"gpt2xla_attention_{direction}",  # by which `tpu_check` knows it
    )

    def function(*args: jax.Array) -> Any:
        return call(*args)

    function.arguments = [arrays[kind] for kind in inputs]  # type: ignore[attr-defined]
    function.results = [arrays[kind] for kind in outputs]  # type: ignore[attr-defined]
    return function
