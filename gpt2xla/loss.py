"""Cross-entropy of a language model's head, with all logits at once or chunk by chunk.

Both return the summed loss in nats, in fp32 (0-d). Shape suffixes: N tokens, D d_model, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100  # a position with this label has no loss and is not counted


def plain_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    logits_NV = F.linear(x_ND, weight_VD).float()
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED_LABEL, reduction="sum")


def chunked_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunks: int) -> Tensor:
    """The same without ever holding all logits, in fewer products: each chunk's gradient is taken while its logits are at
    hand, where checkpointing would compute them again.

    `chunks` is rounded up to the next divisor of N.
    """
    chunks = next(n for n in range(min(chunks, len(x_ND)), len(x_ND) + 1) if len(x_ND) % n == 0)
    kind = x_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_ND.dtype
    return _ChunkedCrossEntropy.apply(x_ND.to(dtype), weight_VD, labels_N, chunks)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunks: int) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad[:2])
        head_VD = weight_VD.to(x_ND.dtype)
        ids_V = torch.arange(len(weight_VD), device=x_ND.device, dtype=torch.int32)
        # The label's logit from the label's own row: one comparison less in the pass over all logits.
        counted_N = labels_N != IGNORED_LABEL
        rows_ND = F.embedding(torch.where(counted_N, labels_N, 0), head_VD)
        label_logits_N = (x_ND.float() * rows_ND.float()).sum(-1)
        loss = -torch.where(counted_N, label_logits_N, 0.0).sum()
        dx, dweights = [], []
        for x_CD, labels_C, counted_C in zip(*(t.chunk(chunks) for t in (x_ND, labels_N, counted_N)), strict=True):
            logits_CV = (x_CD @ head_VD.t()).float()
            max_C1 = logits_CV.amax(-1, keepdim=True)
            log_sum_C1 = max_C1 + torch.exp(logits_CV - max_C1).sum(-1, keepdim=True).log()
            counted_C1 = counted_C.unsqueeze(-1)
            loss = loss + torch.where(counted_C1, log_sum_C1, 0.0).sum()
            if wants_gradient:
                dlogits_CV = torch.exp(logits_CV - log_sum_C1) - (ids_V == labels_C.int().unsqueeze(-1)).float()
                dlogits_CV = torch.where(counted_C1, dlogits_CV, 0.0).to(x_ND.dtype)
                dx.append(dlogits_CV @ head_VD)
                dweights.append((dlogits_CV.t() @ x_CD).to(weight_VD.dtype))
        if wants_gradient:
            ctx.save_for_backward(torch.cat(dx), sum(dweights[1:], dweights[0]))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, dweight_VD = ctx.saved_tensors
        return dx_ND * grads[0].to(dx_ND.dtype), dweight_VD * grads[0], None, None
