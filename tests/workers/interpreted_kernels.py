"""Flash attention on XLA's CPU: in place of the TPU's programs, what JAX interprets of the same kernels, or plain formulas.

A worker calls `install` before it makes a runtime or calls `flash_attention_for`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax_literals
from torch import Tensor
from torch_xla.core.xla_builder import computation_from_module_proto, xla_computation_as_func

from gpt2xla.model import pallas_attention
from gpt2xla.model.pallas_attention_shape import Shape
from gpt2xla.runtime.xla import block, flash


def install(exact: bool = False) -> None:
    """`exact` computes attention's plain formulas in fp32 instead, with the kernels' arguments and results. (The kernels
    themselves only know bf16.)"""

    def interpreted(make: Callable[..., Any], shape: Any, tensors: list[Tensor], **options: bool) -> list[Tensor]:
        return list(_program(make, shape, exact, **options)(tensors))

    jax_literals.told_apart()
    flash.pallas_call = block.pallas_call = interpreted


@functools.cache
def _program(make: Callable[..., Any], shape: Any, exact: bool, **options: bool) -> Callable[[list[Tensor]], Any]:
    function = make(shape, interpret=True, **options)
    arguments = function.arguments
    if exact and isinstance(shape, Shape):
        plain = _forward if make is pallas_attention.forward else _backward
        function, arguments = functools.partial(plain, shape, **options), [_fp32(x) for x in arguments]
    jax.config.update("jax_platforms", "cpu")
    module = jax.jit(function, keep_unused=True).lower(*arguments).compiler_ir("hlo").as_serialized_hlo_module_proto()
    return xla_computation_as_func(computation_from_module_proto(f"{make.__name__}{shape}", module), "kernel")


def _fp32(array: Any) -> Any:
    return jax.ShapeDtypeStruct(array.shape, jnp.float32)


def _weights(shape: Shape, q: Any, k: Any) -> Any:
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k, precision="highest") * shape.K**-0.5
    return jnp.where(jnp.tril(jnp.ones((shape.T, shape.T), bool)), scores, -jnp.inf)


def _forward(shape: Shape, *qkv: Any) -> Any:
    q, k, v = (x.reshape(shape.B, shape.T, shape.H, shape.K) for x in qkv)
    scores = _weights(shape, q, k)
    log_sums = jax.nn.logsumexp(scores, axis=-1)
    y = jnp.einsum("bhqs,bshk->bqhk", jnp.exp(scores - log_sums[..., None]), v, precision="highest")
    return y.reshape(qkv[0].shape), log_sums.reshape(shape.B, shape.blocks, shape.heads_per_block, shape.T)


def _backward(shape: Shape, q: Any, k: Any, v: Any, y: Any, log_sums: Any, dy: Any, joint: bool = True) -> Any:
    gradients = jax.vjp(lambda *qkv: _forward(shape, *qkv)[0], q, k, v)[1](dy)
    sums = jnp.stack(gradients).sum(2).swapaxes(0, 1)
    return (jnp.stack(gradients), sums) if joint else (*gradients, sums)
