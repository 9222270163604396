"""The cross-entropy of the output head, with one kernel between its products.

Logits are made in pieces, in the type of the products. The kernel reads each row of them from memory once, for the row's
loss. A second time it reads the row from the cache, and overwrites it with its gradient. Torch's own operations make twice
as many passes through memory. The running maximum and sum are those of Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax".

Shape suffixes: B sequences, T tokens, D d_model, V vocabulary, N = B * T, C tokens of a piece; in the kernel G groups of K
neighbouring columns, one group for each thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2xla.model.arithmetic import compute_dtype
from gpt2xla.model.loss import IGNORED_LABEL, LOGITS_AT_ONCE, space_for_logits

# Threads of a row. A multiprocessor has 2048, with 32 registers each. So it works on two rows at a time: with fewer threads
# it would be on more rows than the caches hold until they are read again.
_THREADS, _REGISTERS = 1024, 32
_IGNORED = tl.constexpr(IGNORED_LABEL)
_LOWEST = tl.constexpr(-3e38)  # finite, so that -inf minus it is a number
# Gradients of logits lie in [-1, 1]. In fp16 they are multiplied by this until they are in fp32 again, since below 6e-8
# they would be 0. A row's sum to 2 at most, so that the gradient of x fits while the head's weights are below 32.
_FP16_SCALE = 1024


def fused_cross_entropy(
    x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, padding: int = 0, *, chunks: int
) -> Tensor:
    """Return the loss as `loss.in_place_cross_entropy` does. Pieces add to the head's gradient in the weight's own type."""
    return _FusedCrossEntropy.apply(x_BTD, weight_VD, labels_BT, padding, chunks)


@torch.no_grad()
def fused_log_sums(x_BTD: Tensor, weight_VD: Tensor, padding: int = 0) -> Tensor:
    """Return the logarithm of the sum of each token's exponentiated logits (B, T), in fp32 and without a gradient.

    Products are in the type of `x_BTD`."""
    x_ND, head_VD = x_BTD.flatten(0, 1), weight_VD.to(x_BTD.dtype)
    log_sums_N = x_ND.new_empty(len(x_ND), dtype=torch.float32)
    chunks = -(-len(x_ND) * len(head_VD) * x_ND.element_size() // LOGITS_AT_ONCE["cuda"])
    for piece, logits_CV in _in_pieces(x_ND, head_VD, chunks):
        by_rows(logits_CV, log_sums_N[piece], padding)
    return log_sums_N.view(x_BTD.shape[:-1])


def _in_pieces(x_ND: Tensor, head_VD: Tensor, chunks: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield where each piece is among the N tokens, and its logits (C, V), which the next piece overwrites."""
    space_CS = space_for_logits(x_ND, len(head_VD), chunks)
    for start in range(0, len(x_ND), len(space_CS)):
        piece = slice(start, start + len(space_CS))
        x_CD = x_ND[piece]
        yield piece, torch.mm(x_CD, head_VD.t(), out=space_CS[: len(x_CD), : len(head_VD)])


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, padding: int, chunks: int) -> Tensor:
        x_ND, labels_N = x_BTD.to(compute_dtype(x_BTD)).flatten(0, 1), labels_BT.flatten()
        head_VD = weight_VD.to(x_ND.dtype)
        losses_N = x_ND.new_empty(len(x_ND), dtype=torch.float32)
        dx_ND, dweight_VD = torch.empty_like(x_ND), torch.empty_like(weight_VD)
        scale = _FP16_SCALE if x_ND.dtype == torch.float16 else 1
        for piece, logits_CV in _in_pieces(x_ND, head_VD, chunks):
            by_rows(logits_CV, losses_N[piece], padding, labels_N[piece], scale)
            torch.mm(logits_CV, head_VD, out=dx_ND[piece])
            beta = 0 if piece.start == 0 else 1
            torch.addmm(dweight_VD, logits_CV.t(), x_ND[piece], out_dtype=weight_VD.dtype, beta=beta, out=dweight_VD)
        ctx.save_for_backward(dx_ND.view_as(x_BTD), dweight_VD)
        ctx.scale, ctx.dtype = scale, x_BTD.dtype
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_BTD, dweight_VD = ctx.saved_tensors
        grad_1 = (grads[0] / ctx.scale).view(1)
        # As a vector `grad_1` is not rounded to the type of `dx_BTD`, and `out` saves a pass that rounds the product.
        dx = torch.mul(dx_BTD, grad_1, out=torch.empty_like(dx_BTD, dtype=ctx.dtype))
        return dx, dweight_VD * grad_1, None, None, None


def by_rows(logits_CV: Tensor, results_C: Tensor, padding: int, labels_C: Tensor | None = None, scale: int = 1) -> None:
    """Write the loss of each row, which is 0 where the label is ignored, and overwrite the logits with the gradient of the
    sum of losses, times `scale`. Without labels write the logarithm of each row's sum, and leave the logits as they are.

    Rows lie as in `space_for_logits`; what lies between them is overwritten, too. A label that is no id, or one of the last
    `padding` ids, has an infinite loss."""
    _row[(len(logits_CV),)](
        logits_CV, labels_C, results_C, logits_CV.shape[1] - padding, scale, STRIDE=logits_CV.stride(0),
        GROUPS=_THREADS, COLUMNS=16 // logits_CV.element_size(), num_warps=_THREADS // 32, maxnreg=_REGISTERS,
    )  # fmt: skip


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    logits, labels, results, real, scale, STRIDE: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * STRIDE
    counted, of_label = True, 0.0
    if labels is not None:
        label = tl.load(labels + row)
        counted = label != _IGNORED
        # Read before any thread can have overwritten it: the threads wait for each other in the sums below.
        of_label = tl.load(logits + label, (label >= 0) & (label < real), -float("inf")).to(tl.float32)

    columns_GK = tl.arange(0, GROUPS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    max_G = tl.full((GROUPS,), _LOWEST, tl.float32)
    sum_G = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, STRIDE, GROUPS * COLUMNS):
        ids_GK = start + columns_GK
        # Masks end where rows do, so that a thread reads its columns at once; `real` may lie between them.
        mask_GK = (ids_GK < STRIDE) & counted
        x_GK = tl.load(logits + ids_GK, mask=mask_GK, other=0.0, eviction_policy="evict_last").to(tl.float32)
        x_GK = tl.where(ids_GK < real, x_GK, -float("inf"))
        new_G = tl.maximum(max_G, tl.max(x_GK, 1))
        sum_G = sum_G * tl.exp(max_G - new_G) + tl.sum(tl.exp(x_GK - new_G[:, None]), 1)
        max_G = new_G
    largest = tl.max(max_G, 0)
    log_sum = largest + tl.log(tl.sum(sum_G * tl.exp(max_G - largest), 0))
    tl.store(results + row, tl.where(counted, log_sum - of_label, 0.0))

    if labels is not None:
        for start in range(0, STRIDE, GROUPS * COLUMNS):
            ids_GK = start + columns_GK
            mask_GK = ids_GK < STRIDE
            x_GK = tl.load(logits + ids_GK, mask=mask_GK & counted, other=0.0, eviction_policy="evict_first")
            x_GK = tl.where(ids_GK < real, x_GK.to(tl.float32), -float("inf"))
            gradient_GK = scale * (tl.exp(x_GK - log_sum) - tl.where(ids_GK == label, 1.0, 0.0))
            gradient_GK = tl.where(counted, gradient_GK, 0.0)
            tl.store(
                logits + ids_GK, gradient_GK.to(logits.dtype.element_ty), mask=mask_GK, eviction_policy="evict_first"
            )
