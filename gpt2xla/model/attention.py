"""Causal self-attention: several ways to compute the same function.

Each one takes queries, keys and values of shape (B, T, D), with heads side by side in D, and returns (B, T, D). If there are
`starts_BT`, attention stays within documents: a query sees no key before its document's start (`documents.py`).
Shape suffixes: B sequences, T tokens, D d_model, H heads, K = D / H, C queries of a chunk, S keys that a query or a
chunk may see, N = B * H."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2xla.config import ModelConfig
from gpt2xla.model.arithmetic import Fence, no_fence

_QUERY_CHUNKS = 4  # more chunks skip more of the future (4 skip 37% of all scores), but their products are smaller


def sdpa_attention(
    q_BTD: Tensor, k_BSD: Tensor, v_BSD: Tensor, num_heads: int, dropout: float = 0.0, mask_B1TS: Tensor | None = None
) -> Tensor:
    """torch's own attention, the fastest on GPUs. `mask_B1TS` is added to the scores; None means causal attention, S = T."""
    q_BHTK, k_BHSK, v_BHSK = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q_BTD, k_BSD, v_BSD))
    y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, mask_B1TS, dropout, is_causal=mask_B1TS is None)
    return y_BHTK.transpose(1, 2).flatten(2)


def chunked_attention(
    q_BTD: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    num_heads: int,
    starts_BT: Tensor | None = None,
    fence: Fence = no_fence,
) -> Tensor:
    """Attention that keeps no scores for the backward pass but computes them again, one chunk of queries after the other and
    without the keys in a chunk's future (after Rabe and Staats 2021, "Self-attention does not need O(n^2) memory", and
    Dao et al. 2022, FlashAttention). It suits compilers: a few large products, and no loop.

    Without the device's `fence`, a compiler would see that the scores are computed twice, and would keep them."""
    heads = (x.unflatten(-1, (num_heads, -1)) for x in (q_BTD, k_BTD, v_BTD))
    return _ChunkedAttention.apply(*heads, starts_BT, fence).flatten(2)


def kept_attention(
    q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, num_heads: int, starts_BT: Tensor | None = None
) -> Tensor:
    """Attention that keeps its weights for the backward pass, without those of the future: a little more than
    B * H * T^2 / 2 numbers. It is the fastest on CPUs, where matrix products are better than fused attention. Each step
    overwrites the one before, so it is not for compilers."""
    return _KeptAttention.apply(q_BTD, k_BTD, v_BTD, num_heads, starts_BT)


def attention_weights(q_BTD: Tensor, k_BTD: Tensor, num_heads: int, starts_BT: Tensor | None = None) -> Tensor:
    """Return the share with which each query's output takes each value, in fp32 (B, H, T, T). A query's shares sum to 1, and
    are exactly 0 for keys that it does not see. The attentions above never hand them out; this is for looking at them."""
    q_BTHK, k_BTHK = (x.unflatten(-1, (num_heads, -1)) for x in (q_BTD, k_BTD))
    everything = slice(0, q_BTHK.shape[1])
    return _scores(q_BTHK / math.sqrt(q_BTHK.shape[-1]), k_BTHK, everything, everything, starts_BT).softmax(-1)


def kept_numbers(sequences: int, model: ModelConfig) -> int:
    """Return how many weights `kept_attention` keeps in all layers together, for sequences of full length."""
    scores = sum((q.stop - q.start) * keys.stop for q, keys in _chunks(model.seq_length))
    return sequences * model.num_layers * model.num_heads * scores


class _KeptAttention(torch.autograd.Function):
    """Computes with heads beside sequences, N = B * H, as batched products expect them."""

    @staticmethod
    def forward(
        ctx: Any, q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, num_heads: int, starts_BT: Tensor | None
    ) -> Tensor:
        q_NTK, k_NTK, v_NTK = (_beside_sequences(x, num_heads) for x in (q_BTD, k_BTD, v_BTD))
        q_NTK = q_NTK / math.sqrt(q_NTK.shape[-1])
        y_NTK, kept = torch.empty_like(q_NTK), []
        for queries, keys in _chunks(q_NTK.shape[1]):
            scores_NCS = q_NTK[:, queries] @ k_NTK[:, keys].mT
            now_NCC = scores_NCS[..., queries]  # the only keys that may lie in a query's future
            now_NCC += torch.full(now_NCC.shape[1:], -torch.inf, dtype=now_NCC.dtype).triu(1)
            if starts_BT is not None:
                before_BCS = torch.arange(keys.stop, device=starts_BT.device) < starts_BT[:, queries, None]
                scores_NCS.unflatten(0, (-1, num_heads)).masked_fill_(before_BCS[:, None], -torch.inf)
            weights_NCS = torch.softmax(scores_NCS, -1, out=scores_NCS)
            y_NTK[:, queries] = weights_NCS @ v_NTK[:, keys]
            kept.append(weights_NCS)
        ctx.save_for_backward(q_NTK, k_NTK, v_NTK, *kept)
        ctx.num_heads = num_heads
        return _side_by_side(y_NTK, num_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NTK, k_NTK, v_NTK, *kept = ctx.saved_tensors
        dy_NTK, scale = _beside_sequences(grads[0], ctx.num_heads), 1 / math.sqrt(q_NTK.shape[-1])
        dq_NTK, dk_NTK, dv_NTK = torch.empty_like(q_NTK), torch.zeros_like(k_NTK), torch.zeros_like(v_NTK)
        for (queries, keys), weights_NCS in zip(_chunks(q_NTK.shape[1]), kept, strict=True):
            dweights_NCS = dy_NTK[:, queries] @ v_NTK[:, keys].mT
            dscores_NCS = torch._softmax_backward_data(dweights_NCS, weights_NCS, -1, weights_NCS.dtype)
            dq_NTK[:, queries] = dscores_NCS @ k_NTK[:, keys] * scale
            dk_NTK[:, keys] += dscores_NCS.mT @ q_NTK[:, queries]
            dv_NTK[:, keys] += weights_NCS.mT @ dy_NTK[:, queries]
        return *(_side_by_side(x, ctx.num_heads) for x in (dq_NTK, dk_NTK, dv_NTK)), None, None


def _beside_sequences(x_BTD: Tensor, num_heads: int) -> Tensor:
    return x_BTD.unflatten(-1, (num_heads, -1)).transpose(1, 2).flatten(0, 1)


def _side_by_side(x_NTK: Tensor, num_heads: int) -> Tensor:
    return x_NTK.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, starts_BT: Tensor | None, fence: Fence
    ) -> Tensor:
        q_BTHK = q_BTHK / math.sqrt(q_BTHK.shape[-1])
        # A column of ones beside the values gives the sum over each row of weights. On matrix units of 128 columns it is
        # free, while a separate sum would read all weights once more.
        ones_BTHK = torch.cat([v_BTHK, torch.ones_like(v_BTHK[..., :1])], dim=-1)
        outputs, log_sums = [], []
        for queries, keys in _chunks(q_BTHK.shape[1]):
            scores_BHCS = _scores(q_BTHK, k_BTHK, queries, keys, starts_BT)
            max_BHC1 = scores_BHCS.amax(-1, keepdim=True)
            weights_BHCS = torch.exp(scores_BHCS - max_BHC1).to(v_BTHK.dtype)
            y_BCHK = torch.einsum("bhqk,bkhd->bqhd", weights_BHCS, ones_BTHK[:, keys]).float()
            sum_BCH1 = y_BCHK[..., -1:]
            outputs.append((y_BCHK[..., :-1] / sum_BCH1).to(v_BTHK.dtype))
            log_sums.append(max_BHC1 + sum_BCH1.transpose(1, 2).log())
        y_BTHK, log_sum_BHT1 = torch.cat(outputs, dim=1), torch.cat(log_sums, dim=2)
        ctx.save_for_backward(q_BTHK, k_BTHK, v_BTHK, y_BTHK, log_sum_BHT1, starts_BT)
        ctx.fence = fence
        return y_BTHK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_BTHK,) = grads
        q_BTHK, k_BTHK, v_BTHK, y_BTHK, log_sum_BHT1, starts_BT = ctx.saved_tensors
        fenced = [x.clone() for x in (q_BTHK, k_BTHK, v_BTHK, log_sum_BHT1, dy_BTHK)]
        ctx.fence(fenced)
        q_BTHK, k_BTHK, v_BTHK, log_sum_BHT1, dy_BTHK = fenced
        # For y = softmax(s) v the gradient of s is softmax(s) * (dy v^T - delta), delta the row sums of dy * y.
        delta_BHT1 = (dy_BTHK.float() * y_BTHK.float()).sum(-1).transpose(1, 2).unsqueeze(-1)
        dq: list[Tensor] = []
        dk_BTHK = dv_BTHK = None
        for queries, keys in _chunks(q_BTHK.shape[1]):
            scores_BHCS = _scores(q_BTHK, k_BTHK, queries, keys, starts_BT)
            weights_BHCS = torch.exp(scores_BHCS - log_sum_BHT1[:, :, queries])
            dweights_BHCS = torch.einsum("bqhd,bkhd->bhqk", dy_BTHK[:, queries], v_BTHK[:, keys]).float()
            dscores_BHCS = (weights_BHCS * (dweights_BHCS - delta_BHT1[:, :, queries])).to(q_BTHK.dtype)
            dq.append(torch.einsum("bhqk,bkhd->bqhd", dscores_BHCS, k_BTHK[:, keys]))
            dk_BSHK = torch.einsum("bhqk,bqhd->bkhd", dscores_BHCS, q_BTHK[:, queries])
            dv_BSHK = torch.einsum("bhqk,bqhd->bkhd", weights_BHCS.to(v_BTHK.dtype), dy_BTHK[:, queries])
            unseen = (0, 0, 0, 0, 0, k_BTHK.shape[1] - keys.stop)
            dk_BTHK = F.pad(dk_BSHK, unseen) if dk_BTHK is None else dk_BTHK + F.pad(dk_BSHK, unseen)
            dv_BTHK = F.pad(dv_BSHK, unseen) if dv_BTHK is None else dv_BTHK + F.pad(dv_BSHK, unseen)
        dq_BTHK = torch.cat(dq, dim=1) / math.sqrt(q_BTHK.shape[-1])
        return dq_BTHK, dk_BTHK, dv_BTHK, None, None


def _chunks(length: int) -> list[tuple[slice, slice]]:
    """Return the queries of each chunk and the keys that they may see."""
    size = -(-length // _QUERY_CHUNKS)
    return [(slice(a, min(a + size, length)), slice(0, min(a + size, length))) for a in range(0, length, size)]


def _scores(q_BTHK: Tensor, k_BTHK: Tensor, queries: slice, keys: slice, starts_BT: Tensor | None) -> Tensor:
    """Return a chunk's scores in fp32, with a large negative number for keys that the query does not see."""
    scores_BHCS = torch.einsum("bqhd,bkhd->bhqk", q_BTHK[:, queries], k_BTHK[:, keys]).float()
    query_C1 = torch.arange(queries.stop - queries.start, device=q_BTHK.device)[:, None] + queries.start
    key_1S = torch.arange(keys.stop, device=q_BTHK.device)[None, :]
    visible = query_C1 >= key_1S
    if starts_BT is not None:
        visible = visible & (key_1S >= starts_BT[:, None, queries, None])
    return torch.where(visible, scores_BHCS, -1e30)
