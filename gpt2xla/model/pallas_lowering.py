"""Turns kernels written in JAX's Pallas into programs that XLA embeds in a graph of any frontend; JAX only lowers them."""

from __future__ import annotations

import json
from typing import Any

import jax


def lower(kernel: Any) -> str:
    """Return a kernel, such as `forward(shape)`, as the payload of a `tpu_custom_call`. This runs on any machine and
    initialises no device."""
    use_libtpu_version()
    jax.config.update("jax_platforms", "cpu")  # otherwise JAX would take the TPU away from torch_xla
    text = str(jax.jit(kernel).trace(*kernel.arguments).lower(lowering_platforms=("tpu",)).compiler_ir())
    start = text.index('backend_config = "', text.index("@tpu_custom_call")) + len('backend_config = "')
    # MLIR escapes quotes as \22.
    payload = text[start : text.index('"', start)].replace("\\22", '"').replace("\\5C", "\\")
    json.loads(payload)
    return payload


def use_libtpu_version() -> None:
    """Make JAX write kernels in the version of their language that the libtpu of torch_xla 2.9 reads."""
    from jax._src import tpu_custom_call

    tpu_custom_call.get_ir_version = lambda *args: 7
