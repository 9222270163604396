"""The products of a block as TPU kernels that also do the elementwise work around them: layer norm, activation, residual
sum, biases, and their gradients. XLA reads and writes main memory once more for most of it, and its products with much work
at their edges stay far below the matrix units' rate.

Each kernel runs over tiles of tokens, with the whole weight in the core's own memory, so that a layer norm sees whole rows.
What is kept for the backward pass, and operands of products, are bf16; the residual stream and its gradient are fp32, as all
arithmetic is. A layer norm's output is kept normalised, without its weight and bias, beside 1 / sqrt(variance + eps) of each
token, its scale. Sums over all tokens grow from tile to tile, as eight rows each: their sum is what is meant.

Shape suffixes: N tokens, R tokens of a tile, D d_model, F d_ff, G = N / R tiles, S = 8 rows of a register."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_COLUMNS = 512  # of a product at a time, where it is not needed whole
_S = 8
_MEMORY = 100 * 2**20  # bytes that a kernel may use; cores of v5e and v6e have 128 MiB
_FP32 = jnp.float32


@dataclass(frozen=True)
class Rows:
    """The shape of one call: N tokens, D columns of the residual stream, F of the feed-forward layers."""

    N: int
    D: int
    F: int
    activation: str = "gelu-tanh"
    eps: float = 1e-5  # of the layer norms
    bf16: bool = True  # what is kept, and operands; if not, they are fp32, which serves to check the formulas

    @property
    def dtype(self) -> Any:
        return jnp.bfloat16 if self.bf16 else _FP32

    @property
    def R(self) -> int:
        return 256 if self.N % 256 == 0 else 128

    @property
    def supported(self) -> bool:
        weight = 2 * 2 * self.D * self.F  # room for two
        tiles = self.R * (2 * 2 * 2 * self.F + 2 * 12 * self.D + 2 * 4 * self.F)
        whole_registers = self.N % 128 == 0 and self.D % 128 == 0 and self.F % 128 == 0
        return whole_registers and self.activation in _ACTIVATIONS and weight + tiles <= _MEMORY


def project(rows: Rows, interpret: bool = False) -> Any:
    """Return the kernel (normalised_ND, norm weight (1, D), norm bias (1, D), weight (3 D, D), bias (1, 3 D)) -> q, k, v,
    each (N, D): the layer norm's last two steps, and the three projections."""
    D = rows.D

    def body(n_ref: Any, norm_weight: Any, norm_bias: Any, weight: Any, bias: Any, *outputs: Any) -> None:
        x_RD = _scaled(rows, n_ref, norm_weight, norm_bias)
        for part, output in enumerate(outputs):
            columns = slice(part * D, (part + 1) * D)
            output[...] = (_product(x_RD, weight[columns], 1) + bias[:, columns]).astype(rows.dtype)

    inputs = [_tile(rows, D), _whole(1, D), _whole(1, D), _weight(rows, 3 * D, D), _whole(1, 3 * D)]
    return _call(rows, "project", body, inputs, [_tile(rows, D)] * 3, 3 * D * D, interpret)


def expand(rows: Rows, interpret: bool = False) -> Any:
    """Return the kernel (normalised_ND, norm weight (1, D), norm bias (1, D), weight (F, D), bias (1, F)) -> h_NF: the layer
    norm's last two steps, and the first feed-forward layer before its activation."""
    D, F = rows.D, rows.F

    def body(n_ref: Any, norm_weight: Any, norm_bias: Any, weight: Any, bias: Any, output: Any) -> None:
        x_RD = _scaled(rows, n_ref, norm_weight, norm_bias)
        for columns in _columns(F):
            output[:, columns] = (_product(x_RD, weight[columns], 1) + bias[:, columns]).astype(rows.dtype)

    inputs = [_tile(rows, D), _whole(1, D), _whole(1, D), _weight(rows, F, D), _whole(1, F)]
    return _call(rows, "expand", body, inputs, [_tile(rows, F)], D * F, interpret)


def add_and_normalise(rows: Rows, activated: bool = False, interpret: bool = False) -> Any:
    """Return the kernel (a, weight (D, I), bias (1, D), x_ND) -> (x + a W^T + b, normalised, scale (G, 1, R)).

    `a` is attention's output (N, D) or, `activated`, what the activation is applied to first (N, F)."""
    D = rows.D
    I = rows.F if activated else D  # noqa: E741

    def body(a_ref: Any, weight: Any, bias: Any, x_ref: Any, sum_ref: Any, n_ref: Any, scale_ref: Any) -> None:
        if activated:
            y_RD = sum(
                _product(_activated(rows, a_ref[:, columns]).astype(rows.dtype), weight[:, columns], 1)
                for columns in _columns(I)
            )
        else:
            y_RD = _product(a_ref[...], weight[...], 1)
        x_RD = x_ref[...] + (y_RD + bias[...])
        sum_ref[...] = x_RD
        centred_RD = x_RD - jnp.mean(x_RD, axis=1, keepdims=True)
        scale_R1 = jax.lax.rsqrt(jnp.mean(centred_RD * centred_RD, axis=1, keepdims=True) + rows.eps)
        n_ref[...] = (centred_RD * scale_R1).astype(rows.dtype)
        scale_ref[0] = jnp.broadcast_to(scale_R1, (rows.R, 128)).T[:1]

    inputs = [_tile(rows, I), _weight(rows, D, I), _whole(1, D), _tile(rows, D, _FP32)]
    outputs = [_tile(rows, D, _FP32), _tile(rows, D), _scales(rows)]
    return _call(rows, "add_and_normalise" + "_activated" * activated, body, inputs, outputs, D * I, interpret)


def differentiate_activation(rows: Rows, interpret: bool = False) -> Any:
    """Return the kernel (dy_ND in fp32, weight (D, F), h_NF) -> (dh_NF, sums of dh (S, F), sums of dy (S, D)), for y = W
    activation(h)."""
    D, F = rows.D, rows.F

    def body(dy_ref: Any, weight: Any, h_ref: Any, dh_ref: Any, dh_sums: Any, dy_sums: Any) -> None:
        _zero_at_first(dh_sums, dy_sums)
        dy_sums[...] += _summed(dy_ref[...])
        dy_RD = dy_ref[...].astype(rows.dtype)
        for columns in _columns(F):
            dh = _product(dy_RD, weight[:, columns], 0) * _slope(rows, h_ref[:, columns])
            dh_sums[:, columns] += _summed(dh)
            dh_ref[:, columns] = dh.astype(rows.dtype)

    inputs = [_tile(rows, D, _FP32), _weight(rows, D, F), _tile(rows, F)]
    return _call(
        rows, "differentiate_activation", body, inputs, [_tile(rows, F), _whole(_S, F), _whole(_S, D)], D * F, interpret
    )


def differentiate_norm(rows: Rows, interpret: bool = False) -> Any:
    """Return the kernel (dh_NF, weight (F, D), normalised_ND, scale (G, 1, R), norm weight (1, D), dsum_ND) -> (dx_ND, sums
    (3, S, D)), for the first feed-forward layer, which reads a layer norm of x, and for the residual stream behind it, whose
    gradient is dsum. The three sums are the gradients of the norm's weight and bias, and the sum of dx."""
    return _through_norm(rows, "differentiate_norm", [_tile(rows, rows.F)], interpret)


def differentiate_projections(rows: Rows, interpret: bool = False) -> Any:
    """Return the same kernel for the three projections: (dq_ND, dk_ND, dv_ND, weight (3 D, D), ...) -> (dx_ND, sums)."""
    return _through_norm(rows, "differentiate_projections", [_tile(rows, rows.D)] * 3, interpret)


def _through_norm(rows: Rows, name: str, gradients: list[Argument], interpret: bool) -> Any:
    D, widths = rows.D, [array.shape[1] for _, array in gradients]

    def body(*refs: Any) -> None:
        *dy_refs, weight, n_ref, scale_ref, norm_weight, dsum_ref, dx_ref, sums = refs
        _zero_at_first(sums)
        dnorm_RD: Any = 0.0
        for number, dy_ref in enumerate(dy_refs):
            inputs = slice(sum(widths[:number]), sum(widths[: number + 1]))
            dnorm_RD += _product(dy_ref[...], weight[inputs], 0)
        n_RD = n_ref[...].astype(_FP32)
        dn_RD = dnorm_RD * norm_weight[...]
        along_R1 = jnp.mean(dn_RD * n_RD, axis=1, keepdims=True)
        scale_R1 = jnp.broadcast_to(scale_ref[0], (128, rows.R)).T[:, :1]
        dx_RD = dsum_ref[...] + scale_R1 * (dn_RD - jnp.mean(dn_RD, axis=1, keepdims=True) - n_RD * along_R1)
        dx_ref[...] = dx_RD
        for part, values in enumerate((dnorm_RD * n_RD, dnorm_RD, dx_RD)):
            sums[part] += _summed(values)

    inputs = [
        *gradients, _weight(rows, sum(widths), D), _tile(rows, D), _scales(rows), _whole(1, D), _tile(rows, D, _FP32),
    ]  # fmt: skip
    return _call(rows, name, body, inputs, [_tile(rows, D, _FP32), _whole(3, _S, D)], sum(widths) * D, interpret)


Argument = tuple[pl.BlockSpec, jax.ShapeDtypeStruct]


def _tile(rows: Rows, columns: int, dtype: Any = None) -> Argument:
    dtype = dtype or rows.dtype
    return pl.BlockSpec((rows.R, columns), lambda tile: (tile, 0)), jax.ShapeDtypeStruct((rows.N, columns), dtype)


def _whole(*shape: int, dtype: Any = _FP32) -> Argument:
    return pl.BlockSpec(shape, lambda tile: (0,) * len(shape)), jax.ShapeDtypeStruct(shape, dtype)


def _weight(rows: Rows, *shape: int) -> Argument:
    return _whole(*shape, dtype=rows.dtype)


def _scales(rows: Rows) -> Argument:
    # Along rows of registers: as a column, each number would take a whole row.
    shape = (rows.N // rows.R, 1, rows.R)
    return pl.BlockSpec((1, 1, rows.R), lambda tile: (tile, 0, 0)), jax.ShapeDtypeStruct(shape, _FP32)


def _call(
    rows: Rows,
    name: str,
    body: Callable[..., None],
    inputs: list[Argument],
    outputs: list[Argument],
    weights: int,
    interpret: bool,
) -> Any:
    assert rows.N % rows.R == 0, f"{rows.N} tokens are no whole tiles: the last ones would not be computed"
    arrays = [array for _, array in (*inputs, *outputs)]
    call = pl.pallas_call(
        body,
        grid=(rows.N // rows.R,),
        in_specs=[spec for spec, _ in inputs],
        out_specs=[spec for spec, _ in outputs],
        out_shape=[array for _, array in outputs],
        cost_estimate=pl.CostEstimate(
            flops=2 * rows.N * weights,
            transcendentals=0,
            bytes_accessed=sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays),
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_MEMORY),
        name=f"gpt2xla_{name}",
        interpret=interpret,
    )

    def function(*args: jax.Array) -> Any:
        return call(*args)

    function.arguments = [array for _, array in inputs]  # type: ignore[attr-defined]
    function.results = [array for _, array in outputs]  # type: ignore[attr-defined]
    return function


def _columns(count: int) -> list[slice]:
    return [slice(start, min(start + _COLUMNS, count)) for start in range(0, count, _COLUMNS)]


def _product(a: jax.Array, b: jax.Array, b_axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (b_axis,)), ((), ())), preferred_element_type=_FP32)


def _scaled(rows: Rows, n_ref: Any, norm_weight: Any, norm_bias: Any) -> jax.Array:
    return (n_ref[...].astype(_FP32) * norm_weight[...] + norm_bias[...]).astype(rows.dtype)


def _zero_at_first(*refs: Any) -> None:
    @pl.when(pl.program_id(0) == 0)
    def zero() -> None:
        for ref in refs:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _summed(x: jax.Array) -> jax.Array:
    """Return sums over rows, as eight rows."""
    return x.reshape(-1, _S, x.shape[1]).sum(0)


def _gelu_tanh(h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return x Phi(x) by the tanh formula of Hendrycks and Gimpel 2016, and its derivative."""
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    half_tanh = 0.5 * jnp.tanh(h * (scale + scale * cubic * h * h))
    share = 0.5 + half_tanh
    return h * share, share + h * (0.25 - half_tanh * half_tanh) * (2 * scale + 6 * scale * cubic * h * h)


def _relu(h: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.maximum(h, 0.0), (h > 0).astype(_FP32)


# Not gelu-exact: Pallas has no erf.
_ACTIVATIONS = {"gelu-tanh": _gelu_tanh, "relu": _relu}


def _activated(rows: Rows, h: jax.Array) -> jax.Array:
    return _ACTIVATIONS[rows.activation](h.astype(_FP32))[0]


def _slope(rows: Rows, h: jax.Array) -> jax.Array:
    return _ACTIVATIONS[rows.activation](h.astype(_FP32))[1]
