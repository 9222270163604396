"""Cross-entropy of a language model's head, with all logits at once or chunk by chunk.

Both return the summed loss in nats, in fp32 (0-d). The last `padding` rows of the head are of ids that have no tokens: they
get no probability, and their gradient is exactly 0. Masking keeps the products' aligned shapes, which cutting would not.
Shape suffixes: B sequences, T tokens, D d_model, V vocabulary, N = B * T, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2xla.fence import Fence, no_fence

IGNORED_LABEL = -100  # a position with this label has no loss and is not counted


def plain_cross_entropy(x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, padding: int = 0) -> Tensor:
    logits_NV = mask_padding(F.linear(x_BTD, weight_VD).float().flatten(0, 1), padding)
    return F.cross_entropy(logits_NV, labels_BT.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def chunked_cross_entropy(
    x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, padding: int = 0, *, chunks: int, fence: Fence = no_fence
) -> Tensor:
    """The same without ever holding all logits, in fewer products: each chunk's gradient is taken while its logits are at
    hand, where checkpointing would compute them again.

    Chunks are cut along T, so that a batch may be divided over devices; their number is rounded up to a divisor of T.
    """
    length = x_BTD.shape[1]
    chunks = next(n for n in range(min(chunks, length), length + 1) if length % n == 0)
    kind = x_BTD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BTD.dtype
    return _ChunkedCrossEntropy.apply(x_BTD.to(dtype), weight_VD, labels_BT, padding, chunks, fence)


def mask_padding(logits_V: Tensor, padding: int) -> Tensor:
    """-inf for the last `padding` of the last dimension's V entries."""
    if padding == 0:
        return logits_V
    size = logits_V.shape[-1]
    ids_V = torch.arange(size, device=logits_V.device, dtype=torch.int32)
    return logits_V.masked_fill(ids_V >= size - padding, -torch.inf)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, padding: int, chunks: int, fence: Fence
    ) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad[:2])
        head_VD = weight_VD.to(x_BTD.dtype)
        ids_V = torch.arange(len(weight_VD), device=x_BTD.device, dtype=torch.int32)
        # The label's logit from the label's own row: one comparison less in the pass over all logits.
        counted_BT = labels_BT != IGNORED_LABEL
        rows_BTD = F.embedding(torch.where(counted_BT, labels_BT, 0), head_VD)
        label_logits_BT = (x_BTD.float() * rows_BTD.float()).sum(-1)
        loss = -torch.where(counted_BT, label_logits_BT, 0.0).sum()
        dx: list[Tensor] = []
        dweight_VD: Tensor | None = None
        for x_BCD, labels_BC, counted_BC in zip(
            *(t.chunk(chunks, 1) for t in (x_BTD, labels_BT, counted_BT)), strict=True
        ):
            if dweight_VD is not None:
                # One piece after the other: side by side, their logits would fill the memory after all.
                x_BCD = x_BCD.clone()
                fence([x_BCD, dweight_VD])
            logits_BCV = mask_padding(F.linear(x_BCD, head_VD).float(), padding)
            max_BC1 = logits_BCV.amax(-1, keepdim=True)
            log_sum_BC1 = max_BC1 + torch.exp(logits_BCV - max_BC1).sum(-1, keepdim=True).log()
            counted_BC1 = counted_BC.unsqueeze(-1)
            loss = loss + torch.where(counted_BC1, log_sum_BC1, 0.0).sum()
            if wants_gradient:
                is_label_BCV = ids_V == labels_BC.int().unsqueeze(-1)
                dlogits_BCV = torch.exp(logits_BCV - log_sum_BC1) - is_label_BCV.float()
                dlogits_BCV = torch.where(counted_BC1, dlogits_BCV, 0.0).to(x_BTD.dtype)
                dx.append(dlogits_BCV @ head_VD)
                part_VD = torch.einsum("bcv,bcd->vd", dlogits_BCV, x_BCD).to(weight_VD.dtype)
                dweight_VD = part_VD if dweight_VD is None else dweight_VD + part_VD
        if wants_gradient:
            ctx.save_for_backward(torch.cat(dx, dim=1), dweight_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_BTD, dweight_VD = ctx.saved_tensors
        return dx_BTD * grads[0].to(dx_BTD.dtype), dweight_VD * grads[0], None, None, None, None
