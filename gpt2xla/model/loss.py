"""The cross-entropy of a language model's head, with all logits at once or in chunks.

Each function returns the summed loss in nats, in fp32 (0-d). The last `padding` rows of the head belong to ids without
tokens: they get no probability, and their gradient is exactly 0. They are masked, not cut off, so that the shapes of the
products stay aligned.
Shape suffixes: B sequences, T tokens, D d_model, V vocabulary, N = B * T, C tokens of a chunk."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2xla.model.arithmetic import Fence, compute_dtype, no_fence

IGNORED_LABEL = -100  # a position with this label has no loss and is not counted

# How many nats above its label's logit a logit counts at most, in training on compiled devices. exp(64) times any vocabulary
# is a number in fp32. A model that learns is never as wrong: one that knows nothing has losses of log V, about 11.
MOST_ABOVE_LABEL = 64.0

# Bytes of logits that a kind of device makes at a time, unless the user says otherwise. Larger pieces cost memory, smaller
# ones keep matrix units less busy.
LOGITS_AT_ONCE = {"cuda": 2**30, "cpu": 2**29, "xla": 2**30}


def plain_cross_entropy(x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, padding: int = 0) -> Tensor:
    """Return the loss as torch computes it from all logits at once."""
    logits_NV = mask_padding(F.linear(x_BTD, weight_VD).float().flatten(0, 1), padding)
    return F.cross_entropy(logits_NV, labels_BT.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def chunked_cross_entropy(
    x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, padding: int = 0, *, chunks: int, fence: Fence = no_fence
) -> Tensor:
    """Return the same loss without ever holding all logits. The gradient of each chunk is computed together with its logits;
    checkpointing would compute the logits twice.

    In training, exponentials are shifted by the label's logit. It is known before the product, so that compilers sum them
    inside the product; the largest logit would take a pass of its own. None overflows, as a logit counts as at most
    `MOST_ABOVE_LABEL` nats above its label's. Loss and gradient are exactly those of such logits: up to 60 nats they are
    those of any other form; larger losses, which only a diverged training has, come out as at most 64 + log V, with a
    gradient that still moves the label against all that stands above it. Without a gradient every loss is exact.

    Chunks are cut along T, so that a batch may be split over devices; their number is rounded up to a divisor of T."""
    length = x_BTD.shape[1]
    chunks = next(n for n in range(min(chunks, length), length + 1) if length % n == 0)
    if not torch.is_grad_enabled():
        x_BTD, weight_VD = x_BTD.detach(), weight_VD.detach()
    return _ChunkedCrossEntropy.apply(x_BTD.to(compute_dtype(x_BTD)), weight_VD, labels_BT, padding, chunks, fence)


def in_place_cross_entropy(
    x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, padding: int = 0, *, chunks: int, reads_wait: bool = False
) -> Tensor:
    """Return the same as `chunked_cross_entropy`, on devices that run each operation when it is called: each pass over the
    logits overwrites them, until they hold their own gradient. They stay in the type of the products, such as bf16.

    `reads_wait` says that reading a value makes the host wait for the device, as on GPUs. Then no value is read, and what
    is multiplied is laid out for GPUs. Otherwise a row's log-sum-exp is recovered from its label's probability, unless that
    is too small: it saves two passes."""
    return _InPlaceCrossEntropy.apply(x_BTD.to(compute_dtype(x_BTD)), weight_VD, labels_BT, padding, chunks, reads_wait)


def space_for_logits(x_ND: Tensor, vocab_size: int, chunks: int) -> Tensor:
    """Return memory (C, S) whose first V columns hold the logits of one of `chunks` pieces, laid out as GPUs multiply fast.

    S is V rounded up, so that rows begin at multiples of 128 bytes. From odd addresses a product takes several times as
    long. C is a multiple of 128, of the tiles of a product, or all N."""
    rows = min(_rounded_up(-(-len(x_ND) // chunks), 128), len(x_ND))
    return x_ND.new_empty(rows, _rounded_up(vocab_size, 64))


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def mask_padding(logits_V: Tensor, padding: int) -> Tensor:
    """Return logits that are -inf for the last `padding` of V ids."""
    if padding == 0:
        return logits_V
    size = logits_V.shape[-1]
    ids_V = torch.arange(size, device=logits_V.device, dtype=torch.int32)
    return logits_V.masked_fill(ids_V >= size - padding, -torch.inf)


def logits_of_labels(x_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor) -> Tensor:
    """Return each label's logit (B, T) in fp32, from the label's own row of the head, which saves a comparison per logit."""
    rows_BTD = F.embedding(torch.where(labels_BT != IGNORED_LABEL, labels_BT, 0), head_VD)
    return (x_BTD.float() * rows_BTD.float()).sum(-1)


class _WithGradient(torch.autograd.Function):
    """A loss whose forward pass has saved its gradients."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_BTD, dweight_VD = ctx.saved_tensors
        return dx_BTD * grads[0].to(dx_BTD.dtype), dweight_VD * grads[0], None, None, None, None


class _ChunkedCrossEntropy(_WithGradient):
    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, padding: int, chunks: int, fence: Fence
    ) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad[:2])
        head_VD = weight_VD.to(x_BTD.dtype)
        ids_V = torch.arange(len(weight_VD), device=x_BTD.device, dtype=torch.int32)
        counted_BT = labels_BT != IGNORED_LABEL
        label_logits_BT = logits_of_labels(x_BTD, head_VD, labels_BT)
        losses: list[Tensor] = []
        dx: list[Tensor] = []
        dweight_VD: Tensor | None = None
        parts = (t.chunk(chunks, 1) for t in (x_BTD, labels_BT, counted_BT, label_logits_BT))
        for x_BCD, labels_BC, counted_BC, label_logits_BC in zip(*parts, strict=True):
            if dweight_VD is not None:
                # One chunk after the other: side by side, their logits would fill the memory after all.
                x_BCD = x_BCD.clone()
                fence([x_BCD, dweight_VD])
            logits_BCV = mask_padding(F.linear(x_BCD, head_VD).float(), padding)
            label_logits_BC1, counted_BC1 = label_logits_BC.unsqueeze(-1), counted_BC.unsqueeze(-1)
            if wants_gradient:
                shift_BC1 = label_logits_BC1
                logits_BCV = torch.minimum(logits_BCV, shift_BC1 + MOST_ABOVE_LABEL)
            else:
                shift_BC1 = logits_BCV.amax(-1, keepdim=True)
            sum_BC1 = torch.exp(logits_BCV - shift_BC1).sum(-1, keepdim=True)
            # A label's logit and its product round differently: where both are tens of thousands, no summand may be left.
            log_sum_BC1 = sum_BC1.clamp(min=torch.finfo(torch.float32).tiny).log()
            losses_BC1 = log_sum_BC1 + (shift_BC1 - label_logits_BC1)
            losses.append(torch.where(counted_BC1, losses_BC1, 0.0).sum())
            if wants_gradient:
                is_label_BCV = ids_V == labels_BC.int().unsqueeze(-1)
                dlogits_BCV = torch.exp(logits_BCV - (shift_BC1 + log_sum_BC1)) - is_label_BCV.float()
                dlogits_BCV = torch.where(counted_BC1, dlogits_BCV, 0.0).to(x_BTD.dtype)
                dx.append(dlogits_BCV @ head_VD)
                part_VD = torch.einsum("bcv,bcd->vd", dlogits_BCV, x_BCD).to(weight_VD.dtype)
                dweight_VD = part_VD if dweight_VD is None else dweight_VD + part_VD
        if wants_gradient:
            ctx.save_for_backward(torch.cat(dx, dim=1), dweight_VD)
        return torch.stack(losses).sum()


class _InPlaceCrossEntropy(_WithGradient):
    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, padding: int, chunks: int, reads_wait: bool
    ) -> Tensor:
        x_ND, labels_N = x_BTD.flatten(0, 1), labels_BT.flatten()
        counted_N = labels_N != IGNORED_LABEL
        wants_gradient = any(ctx.needs_input_grad[:2])
        head_VD = weight_VD.to(x_ND.dtype)
        losses, dx_ND, dweight_VD = [], torch.empty_like(x_ND), None
        ids = len(head_VD)
        if reads_wait:
            space_CS = space_for_logits(x_ND, ids, chunks)
        else:
            space_CS = x_ND.new_empty(-(-len(x_ND) // chunks), ids)
        rows_C = torch.arange(len(space_CS), device=x_ND.device)
        parts = (t.split(len(space_CS)) for t in (x_ND, labels_N.where(counted_N, 0), counted_N, dx_ND))
        for x_CD, labels_C, counted_C, dx_CD in zip(*parts, strict=True):
            logits_CS = space_CS[: len(x_CD)]
            torch.mm(x_CD, head_VD.t(), out=logits_CS[:, :ids])
            logits_CS[:, ids - padding :] = -torch.inf
            of_labels = rows_C[: len(x_CD)], labels_C
            if logits_CS.dtype == torch.float16:  # whose probabilities below 6e-5 are subnormal, with poor logarithms
                logits_CS = logits_CS.float()
            label_logits_C = logits_CS[of_labels].float()
            if reads_wait:
                max_C = logits_CS.amax(-1).float()
                probabilities_CS = torch.softmax(logits_CS, -1, out=logits_CS)
                log_sum_C = max_C - probabilities_CS.amax(-1).float().log()
            else:
                probabilities_CS = torch.softmax(logits_CS, -1, out=logits_CS)
                label_probabilities_C = probabilities_CS[of_labels].float()
                log_sum_C = label_logits_C - label_probabilities_C.log()
                vanished_C = label_probabilities_C < torch.finfo(torch.float32).tiny
                if vanished_C.any():
                    again_CV = mask_padding((x_CD[vanished_C] @ head_VD.t()).float(), padding)
                    log_sum_C[vanished_C] = again_CV.logsumexp(-1)
            losses.append(torch.where(counted_C, log_sum_C - label_logits_C, 0.0).sum())
            if wants_gradient:
                dlogits_CV = probabilities_CS.to(x_CD.dtype)[:, :ids]  # a copy only in fp16
                # In bf16 scatter_ would copy all of them.
                dlogits_CV[of_labels] = (torch.exp(label_logits_C - log_sum_C) - 1).to(x_CD.dtype)
                counted_C1 = counted_C[:, None]
                if reads_wait:
                    torch.mm(dlogits_CV, head_VD, out=dx_CD).mul_(counted_C1)
                else:  # On CPUs the product is faster this way round.
                    torch.mul((head_VD.t() @ dlogits_CV.t()).t(), counted_C1, out=dx_CD)
                part_VD = (dlogits_CV.t() @ (x_CD * counted_C1)).to(weight_VD.dtype)
                dweight_VD = part_VD if dweight_VD is None else dweight_VD.add_(part_VD)
        if wants_gradient:
            ctx.save_for_backward(dx_ND.view_as(x_BTD), dweight_VD)
        return torch.stack(losses).sum()
