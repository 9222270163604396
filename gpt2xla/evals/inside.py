"""What a model computes along a text: what it expects after each token, how likely it found the token that came, and which
tokens each head of attention looks at.

Shape suffixes: B = 1 text, T tokens with padding, C tokens of a chunk, D d_model, V vocabulary, K candidates, L layers,
H heads, S tokens whose attention is kept; N tokens of the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gpt2xla.errors import RunFailed
from gpt2xla.evals.multiple_choice import bucket_lengths
from gpt2xla.model.attention import attention_weights, sdpa_attention
from gpt2xla.model.documents import document_mask
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Attention, Kernels
from gpt2xla.model.loss import mask_padding
from gpt2xla.runtime.base import Device

MOST_TOKENS = 1024
ATTENTION_TOKENS = 128  # the first of a text; all layers and heads of GPT-2 (124M) are 9 MiB then
CANDIDATES = 10
_CHUNK = 128  # tokens whose logits are in memory together


@dataclasses.dataclass(frozen=True)
class Inside:
    """Of one text. Log-probabilities are in nats; entry t of the first four concerns the token at t.

    Attributes:
        ids: the tokens that were read.
        log_probs: (N,) of each token given those before it; NaN for the first one, which nothing predicts.
        ranks: (N,) how many ids were likelier than the token, at its place; 0 for the first one.
        candidates: (N, K) the likeliest ids after each token, the likeliest first.
        candidate_log_probs: (N, K) theirs.
        attention: (L, H, S, S) for each query among the first S tokens, its shares of the keys; rows sum to 1."""

    ids: list[int]
    log_probs: np.ndarray
    ranks: np.ndarray
    candidates: np.ndarray
    candidate_log_probs: np.ndarray
    attention: np.ndarray


def most_tokens(model: GPT2) -> int:
    """Return the length of the longest text that `look_inside` reads."""
    return min(MOST_TOKENS, model.config.seq_length)


@torch.no_grad()
def look_inside(model: GPT2, ids: Sequence[int], device: Device) -> Inside:
    """Read a text of 1 to `most_tokens` ids once. With `model.end_of_text`, documents in it are read apart, as they were in
    training with --document-mask.

    Where each shape costs a compile, there is one program for each of a few lengths, whatever the texts. Raises RunFailed if
    the model computes NaN."""
    model.eval()
    count = len(ids)
    length = count
    if model.kernels.static_shapes:
        length = next(bound for bound in bucket_lengths(most_tokens(model)) if bound >= count)
    assert 0 < count <= length
    row = torch.tensor([[*ids] + [0] * (length - count)])  # no token sees the padding, which comes after it

    def read(ids_BT: Tensor) -> tuple[Tensor, ...]:
        with device.autocast():
            return _read(model, ids_BT)

    parts = device.compile_step(read, f"look inside {length} tokens")(device.to_device(row))
    log_probs, ranks, candidates, candidate_log_probs, attention = (part.cpu().numpy() for part in parts)
    if np.isnan(candidate_log_probs[:count]).any():
        raise RunFailed("the model's logits are NaN: its weights are damaged, or --dtype is too small for them")
    kept = min(count, ATTENTION_TOKENS)
    return Inside(
        [*ids],
        np.concatenate([[np.nan], log_probs[: count - 1]]),
        np.concatenate([[0], ranks[: count - 1]]),
        candidates[:count],
        candidate_log_probs[:count],
        attention[:, :, :kept, :kept],
    )


def _read(model: GPT2, ids_BT: Tensor) -> tuple[Tensor, ...]:
    """Return what `Inside` holds, of the padded text; the first two concern the token after each one."""
    kernels, weights_HSS = model.kernels, list[Tensor]()
    model.kernels = Kernels(
        attention=_recording(weights_HSS), layer_norm=kernels.layer_norm, separate_qkv=kernels.separate_qkv
    )
    try:
        x_TD = model.hidden(ids_BT)[0]
    finally:
        model.kernels = kernels
    padding = model.config.vocab_padding
    count = min(CANDIDATES, model.config.real_vocab_size)
    next_T1 = torch.cat([ids_BT[0, 1:], ids_BT[0, :1]])[:, None]  # the last one is not used
    chunks = []
    for x_CD, next_C1 in zip(x_TD.split(_CHUNK), next_T1.split(_CHUNK), strict=True):
        logits_CV = mask_padding(kernels.head(x_CD, model.head_weight).float(), padding)
        log_probs_CV = logits_CV.log_softmax(-1)
        came_C1 = log_probs_CV.gather(1, next_C1)
        best = log_probs_CV.topk(count)
        chunks.append((came_C1[:, 0], (log_probs_CV > came_C1).sum(1), best.indices, best.values))
    return *(torch.cat(parts) for parts in zip(*chunks, strict=True)), torch.stack(weights_HSS)


def _recording(weights_HSS: list[Tensor]) -> Attention:
    """Return torch's own attention, which also appends each layer's weights among the first tokens."""

    def attention(q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, num_heads: int, starts_BT: Tensor | None) -> Tensor:
        q_BSD, k_BSD = q_BTD[:, :ATTENTION_TOKENS], k_BTD[:, :ATTENTION_TOKENS]
        starts_BS = None if starts_BT is None else starts_BT[:, :ATTENTION_TOKENS]
        weights_HSS.append(attention_weights(q_BSD, k_BSD, num_heads, starts_BS)[0])
        mask = None if starts_BT is None else document_mask(starts_BT, q_BTD.dtype)
        return sdpa_attention(q_BTD, k_BTD, v_BTD, num_heads, mask_B1TS=mask)

    return attention
