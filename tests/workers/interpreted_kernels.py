"""Flash attention on XLA's CPU: in place of the TPU's programs, what JAX interprets of the same kernels, or plain formulas.

A worker calls `install` before it makes a runtime or calls `flash_attention_for`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch_xla
from torch import Tensor
from torch_xla.core.xla_builder import computation_from_module_proto, xla_computation_as_func

from gpt2xla.model import pallas_attention
from gpt2xla.runtime.xla import flash


def install(exact: bool = False) -> None:
    """`exact` computes attention's plain formulas in fp32 instead, with the kernels' arguments and results. (The kernels
    themselves only know bf16.)"""

    def lowered(sizes: tuple[Any, ...], direction: str) -> tuple[str, tuple[int, int], int]:
        shape = pallas_attention.Shape(*sizes)
        return json.dumps([sizes, direction]), (shape.blocks, shape.heads_per_block), shape.queries_per_chunk

    def custom_call(parts: list[Tensor], payload: str, shapes: list[Any], dtypes: list[Any]) -> list[Tensor]:
        results = list(_program(payload, exact)(parts))
        assert [x.shape for x in results] == shapes
        assert exact or [x.dtype for x in results] == dtypes
        return results

    flash._lowered = lowered  # type: ignore[assignment]
    torch_xla._XLAC._xla_tpu_custom_call = custom_call


@functools.cache
def _program(payload: str, exact: bool) -> Callable[[list[Tensor]], Any]:
    sizes, direction = json.loads(payload)
    shape = pallas_attention.Shape(*sizes)
    kernel = getattr(pallas_attention, direction)(shape, interpret=True)
    function, arguments = kernel, kernel.arguments
    if exact:
        function = functools.partial(_forward if direction == "forward" else _backward, shape)
        arguments = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in arguments]
    jax.config.update("jax_platforms", "cpu")
    module = jax.jit(function, keep_unused=True).lower(*arguments).compiler_ir("hlo").as_serialized_hlo_module_proto()
    return xla_computation_as_func(computation_from_module_proto(f"{direction}{len(payload)}", module), "kernel")


def _weights(shape: pallas_attention.Shape, q: Any, k: Any) -> Any:
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k, precision="highest") * shape.K**-0.5
    return jnp.where(jnp.tril(jnp.ones((shape.T, shape.T), bool)), scores, -jnp.inf)


def _forward(shape: pallas_attention.Shape, *qkv: Any) -> Any:
    q, k, v = (x.reshape(shape.B, shape.T, shape.H, shape.K) for x in qkv)
    scores = _weights(shape, q, k)
    log_sums = jax.nn.logsumexp(scores, axis=-1)
    y = jnp.einsum("bhqs,bshk->bqhk", jnp.exp(scores - log_sums[..., None]), v, precision="highest")
    return y.reshape(qkv[0].shape), log_sums.reshape(shape.B, shape.blocks, shape.heads_per_block, shape.T)


def _backward(shape: pallas_attention.Shape, q: Any, k: Any, v: Any, y: Any, log_sums: Any, dy: Any) -> Any:
    gradients = jnp.stack(jax.vjp(lambda *qkv: _forward(shape, *qkv)[0], q, k, v)[1](dy))
    return gradients, gradients.sum(2).swapaxes(0, 1)


def interpreted_attention() -> Any:
    """Return what a TPU v4 or later would use as `Kernels.projected_attention`, after `install`."""
    return flash.flash_attention_for("TPU v5")
