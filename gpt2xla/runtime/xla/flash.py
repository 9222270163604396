"""Flash attention as a PyTorch/XLA operation: two nodes of the graph, forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor

from gpt2xla.model.kernels import Attention
from gpt2xla.runtime.xla.versions import installed, release_for, why_no_kernels


def flash_attention_for(device_kind: str, mesh: xs.Mesh | None = None) -> Attention:
    """Return causal attention in bf16, on tensors (B, T, D) of a shape that is `supported`, also within documents.

    With a mesh of one axis, for SPMD, each device takes its part of the batch: the partitioner cannot look into the kernel
    to divide it."""
    bf16 = not device_kind.startswith("TPU v3")

    def flash_attention(
        q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, num_heads: int, starts_BT: Tensor | None = None
    ) -> Tensor:
        return _FlashAttention.apply(q_BTD, k_BTD, v_BTD, starts_BT, num_heads, bf16, mesh)

    return flash_attention


def why_no_flash_attention(device_kind: str, num_heads: int, head_size: int, length: int) -> str | None:
    """Return what keeps the kernels from running, or None if nothing does."""
    if not device_kind.startswith("TPU") or device_kind.startswith("TPU v2"):
        return "it needs a TPU v3 or later"
    versions = installed(("torch_xla", "jax"))
    if reason := why_no_kernels(release_for(versions), versions.get("jax")):
        return reason
    from gpt2xla.model.pallas_attention import Shape

    if not Shape(1, length, num_heads, head_size, bf16=not device_kind.startswith("TPU v3")).supported:
        return (
            f"heads of {head_size} columns and --seq-length {length} do not suit it (it takes heads of 32, 64 or 128, and "
            "multiples of 128 tokens, up to 1024 or, with 64 columns and from v4 on, 2048)"
        )
    return None


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, starts_BT: Tensor | None, *kernel: Any
    ) -> Tensor:
        ctx.kernel = kernel
        y_BTD, log_sums = _call("forward", starts_BT, [q_BTD, k_BTD, v_BTD], *kernel)
        ctx.save_for_backward(starts_BT, q_BTD, k_BTD, v_BTD, y_BTD, log_sums)
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        starts_BT, *tensors = ctx.saved_tensors
        gradients_3BTD, _ = _call("backward", starts_BT, [*tensors, grads[0]], *ctx.kernel)
        return *gradients_3BTD, None, None, None, None


def _call(
    direction: str, starts_BT: Tensor | None, tensors: list[Tensor], num_heads: int, bf16: bool, mesh: xs.Mesh | None
) -> list[Tensor]:
    parts = tensors if mesh is None else [_part(tensor, mesh) for tensor in tensors]
    sequences, length, width = parts[0].shape
    sizes = (sequences, length, num_heads, width // num_heads, bf16, starts_BT is not None)
    payload, blocks, chunk = _lowered(sizes, direction)
    if direction == "forward":
        shapes, dtypes = [parts[0].shape, torch.Size((sequences, *blocks, length))], [torch.bfloat16, torch.float32]
    else:
        shapes = [torch.Size((3, *parts[0].shape)), torch.Size((sequences, 3, width))]
        dtypes = [torch.bfloat16, torch.float32]
    if starts_BT is not None:
        starts = [starts_BT[:, None, ::chunk], starts_BT[:, None]]
        parts = [*(starts if mesh is None else [_part(tensor, mesh) for tensor in starts]), *parts]
    results = torch_xla._XLAC._xla_tpu_custom_call(parts, payload, shapes, dtypes)
    if mesh is None:
        return results
    axes = (0, 0) if direction == "forward" else (1, 0)  # of the sequences
    return [_whole(result, len(tensors[0]), mesh, axis) for result, axis in zip(results, axes, strict=True)]


def _part(tensor: Tensor, mesh: xs.Mesh) -> Tensor:
    return xs.enable_manual_sharding(tensor, _by_sequence(tensor, mesh, 0), mesh=mesh).global_tensor


def _whole(part: Tensor, sequences: int, mesh: xs.Mesh, axis: int) -> Tensor:
    shape = torch.Size((*part.shape[:axis], sequences, *part.shape[axis + 1 :]))
    return xs.disable_manual_sharding(part, _by_sequence(part, mesh, axis), shape, mesh=mesh).global_tensor


def _by_sequence(tensor: Tensor, mesh: xs.Mesh, axis: int) -> tuple[str | None, ...]:
    return tuple(mesh.axis_names[0] if place == axis else None for place in range(tensor.dim()))


@functools.cache
def _lowered(sizes: tuple[int, int, int, int, bool, bool], direction: str) -> tuple[str, tuple[int, int], int]:
    from gpt2xla.model import pallas_attention as kernels

    shape = kernels.Shape(*sizes)
    payload = kernels.lower(shape, getattr(kernels, direction))
    return payload, (shape.blocks, shape.heads_per_block), shape.queries_per_chunk
