"""Flash attention as a PyTorch/XLA operation: two nodes of the graph, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor

from gpt2xla.model.arithmetic import compute_dtype
from gpt2xla.model.kernels import ProjectedAttention
from gpt2xla.runtime.xla.layout import mark
from gpt2xla.runtime.xla.pallas_call import pallas_call


def flash_attention_for(device_kind: str, mesh: xs.Mesh | None = None) -> ProjectedAttention:
    """Return causal attention in bf16, on tensors (B, T, D) of a shape that is `supported`, also within documents, together
    with the projection before it.

    With a mesh of one axis, for SPMD, each device takes its part of the batch: the partitioner cannot look into the kernel
    to divide it."""

    def flash_attention(
        x_BTD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, num_heads: int, starts_BT: Tensor | None = None
    ) -> Tensor:
        x_BTD = x_BTD.to(compute_dtype(x_BTD))
        return _ProjectedAttention.apply(x_BTD, weight_ED, bias_E, starts_BT, num_heads, device_kind, mesh)

    return flash_attention


class _ProjectedAttention(torch.autograd.Function):
    """Three products forward, so that XLA writes queries, keys and values each in the layout that the kernel reads. Backward
    their gradients are one array, so that x and the weight have theirs from one product each. The bias has its own from
    the kernel's sums: XLA would read all gradients once more for them."""

    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, starts_BT: Tensor | None, *kernel: Any
    ) -> Tensor:
        own_ED = weight_ED.to(x_BTD.dtype)
        biases = [None] * 3 if bias_E is None else bias_E.to(x_BTD.dtype).chunk(3)
        qkv = [F.linear(x_BTD, *parts) for parts in zip(own_ED.chunk(3), biases, strict=True)]
        y_BTD, log_sums = call("forward", starts_BT, qkv, *kernel)
        ctx.kernel, ctx.bias_dtype = kernel, None if bias_E is None else bias_E.dtype
        ctx.save_for_backward(starts_BT, x_BTD, weight_ED, *qkv, y_BTD, log_sums)
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        starts_BT, x_BTD, weight_ED, *tensors = ctx.saved_tensors
        gradients_3BTD, sums_B3D = call("backward", starts_BT, [*tensors, grads[0]], *ctx.kernel)
        own_3DD = weight_ED.to(x_BTD.dtype).unflatten(0, (3, -1))
        dx_BTD = torch.einsum("sbte,sed->btd", gradients_3BTD, own_3DD)
        dweight_3DD = torch.einsum("sbte,btd->sed", gradients_3BTD, x_BTD)
        dbias_E = None if ctx.bias_dtype is None else sums_B3D.sum(0).flatten().to(ctx.bias_dtype)
        return dx_BTD, dweight_3DD.flatten(0, 1).to(weight_ED.dtype), dbias_E, None, None, None, None


def call(
    direction: str, starts_BT: Tensor | None, tensors: list[Tensor], num_heads: int, device_kind: str,
    mesh: xs.Mesh | None, **options: bool,
) -> list[Tensor]:  # fmt: skip
    """Return what this direction's kernel does (`pallas_attention.py`); `device_kind` and `mesh` are as above."""
    from gpt2xla.model import pallas_attention
    from gpt2xla.model.pallas_attention_shape import Shape

    parts = tensors if mesh is None else [_part(tensor, mesh) for tensor in tensors]
    sequences, length, width = parts[0].shape
    documents = starts_BT is not None
    shape = Shape(sequences, length, num_heads, width // num_heads, device_kind, documents)
    if starts_BT is not None:
        starts = [starts_BT[:, None, :: shape.queries_per_chunk], starts_BT[:, None]]
        parts = [*(starts if mesh is None else [_part(tensor, mesh) for tensor in starts]), *parts]
    results = pallas_call(getattr(pallas_attention, direction), shape, parts, **options)
    if mesh is None:
        return results
    axes = (0, 0) if direction == "forward" else (1, 0)  # of the sequences
    return [_whole(result, len(tensors[0]), mesh, axis) for result, axis in zip(results, axes, strict=True)]


def _part(tensor: Tensor, mesh: xs.Mesh) -> Tensor:
    return torch_xla._XLAC._spmd_full_to_shard_shape(mark(tensor, mesh, _by_sequence(tensor, mesh, 0)))


def _whole(part: Tensor, sequences: int, mesh: xs.Mesh, axis: int) -> Tensor:
    shape = torch.Size((*part.shape[:axis], sequences, *part.shape[axis + 1 :]))
    return xs.disable_manual_sharding(part, _by_sequence(part, mesh, axis), shape, mesh=mesh).global_tensor


def _by_sequence(tensor: Tensor, mesh: xs.Mesh, axis: int) -> tuple[str | None, ...]:
    return tuple(mesh.axis_names[0] if place == axis else None for place in range(tensor.dim()))
