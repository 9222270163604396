"""Noise on token embeddings in training: NEFTune (Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction
Finetuning", arXiv 2310.05914).

torch's generators differ between CPU, CUDA and XLA, so the noise is a hash of integers instead. Arithmetic of int32 wraps
alike on every device.
Shape suffixes: B sequences, T tokens, D d_model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = -0x61C88647  # 2^32 divided by the golden ratio, as int32: far from 0 and from every small number


def embedding_noise(ids_BT: Tensor, seed: Tensor, alpha: float, width: int) -> Tensor:
    """Return independent uniform draws from (-1, 1) times alpha / sqrt(T * width), in fp32 (B, T, width).

    They depend on `seed`, on all ids of their row and on their place in the row, and on nothing else: a row gets the same
    noise on every device, in any batch and in any process. Equal rows with the same seed get equal noise.

    Args:
        seed: 0-d, a whole number of at most 24 bits in any type, so that fp32 holds it exactly."""
    length = ids_BT.shape[1]
    places_T = torch.arange(length, dtype=torch.int32, device=ids_BT.device)
    row_B = _mixed(_mixed(ids_BT.to(torch.int32)) + places_T).sum(dim=1, dtype=torch.int32)
    key_B11 = _mixed(row_B ^ seed.to(torch.int32))[:, None, None]
    places_TD = torch.arange(length * width, dtype=torch.int32, device=ids_BT.device).view(length, width)
    # Mixed twice: after one pass, rows whose keys are close would have the same noise, some places apart.
    bits_BTD = _mixed(_mixed(places_TD + key_B11) ^ _mixed(key_B11 + _GOLDEN))
    # The upper 24 bits as an odd number between -2^24 and 2^24, which fp32 holds exactly. Their mean is exactly 0.
    odd_BTD = _arithmetic_shift(bits_BTD, 8) * 2 + 1
    return odd_BTD.float() * (alpha / math.sqrt(length * width) / 2**24)


def _mixed(x: Tensor) -> Tensor:
    """Return a permutation of the 2^32 values of int32 in which every bit depends on all bits of `x`: Chris Wellons's
    "lowbias32" (2018, github.com/skeeto/hash-prospector), which he found by search. Its bits are free of bias to 0.17 of
    1,000, like those of MurmurHash3's finalizer, from which it takes the form."""
    x = (x ^ _shifted(x, 16)) * 0x7FEB352D
    x = (x ^ _shifted(x, 15)) * (0x846CA68B - 2**32)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, places: int) -> Tensor:
    """Return the bits of `x`, moved to the right. Zeros follow them."""
    return _arithmetic_shift(x, places) & (2 ** (32 - places) - 1)


def _arithmetic_shift(x: Tensor, places: int) -> Tensor:
    """Return `x` / 2^places, rounded down. In torch_xla 2.9 `x >> places` rounds towards 0, and shifting by a Python number
    makes int64 of int32."""
    return torch.bitwise_right_shift(x, torch.full((), places, dtype=torch.int32, device=x.device))
