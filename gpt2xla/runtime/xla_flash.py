"""The flash attention kernels as a PyTorch/XLA operation: two nodes of the graph, one in each direction."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch_xla
from torch import Tensor


def flash_attention(q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, num_heads: int) -> Tensor:
    """Causal attention in bf16, (B, T, D) each; the shape must be `supported`."""
    return _FlashAttention.apply(q_BTD, k_BTD, v_BTD, num_heads)


def why_not(device_kind: str, num_heads: int, head_size: int, length: int) -> str | None:
    """What keeps the kernels from running; None if nothing does."""
    if not device_kind.startswith("TPU") or device_kind.startswith(("TPU v2", "TPU v3")):
        return "it needs a TPU v4 or later"
    try:
        from gpt2xla.flash_attention import Shape
    except ImportError as error:
        return f"it needs jax ({error}); pip install -r requirements-xla_tpu.txt"
    if not Shape(1, length, num_heads, head_size).supported:
        return (
            f"it is made for heads of 32, 64 or 128 columns, not {head_size}, and --seq-length a multiple of 128, "
            f"up to 2048, not {length}"
        )
    return None


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, num_heads: int) -> Tensor:
        sequences, length, width = q_BTD.shape
        ctx.shape = (sequences, length, num_heads, width // num_heads)
        payload, log_sums_shape = _lowered(ctx.shape, "forward")
        y_BTD, log_sums = torch_xla._XLAC._xla_tpu_custom_call(
            [q_BTD, k_BTD, v_BTD], payload, [q_BTD.shape, log_sums_shape], [torch.bfloat16, torch.float32]
        )
        ctx.save_for_backward(q_BTD, k_BTD, v_BTD, y_BTD, log_sums)
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        payload, _ = _lowered(ctx.shape, "backward")
        tensors = [*ctx.saved_tensors, grads[0]]
        shapes, dtypes = [grads[0].shape] * 3, [torch.bfloat16] * 3
        return *torch_xla._XLAC._xla_tpu_custom_call(tensors, payload, shapes, dtypes), None


@functools.cache
def _lowered(sizes: tuple[int, int, int, int], direction: str) -> tuple[str, list[int]]:
    from gpt2xla import flash_attention as kernels

    shape = kernels.Shape(*sizes)
    payload = kernels.lower(shape, getattr(kernels, direction))
    return payload, [shape.B, shape.blocks, shape.heads_per_block, shape.T]
