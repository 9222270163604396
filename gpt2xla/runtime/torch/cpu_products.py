"""How torch multiplies fp32 matrices on a CPU."""

from __future__ import annotations

import torch

from gpt2xla.runtime.base import set_matmul_precision


def choose_products(precision: str) -> None:
    """Set --matmul-precision. For "highest", too, oneDNN computes where that is as exact: on AMD's processors MKL, torch's
    choice for fp32, takes twice as long, and on those without matrix units for bf16 oneDNN computes in fp32 whatever it is
    allowed."""
    set_matmul_precision("medium" if precision == "highest" else precision)
    if precision == "highest" and not _is_exact():
        set_matmul_precision(precision)


def _is_exact() -> bool:
    """Whether a product is within fp32's own rounding: bf16 would be a thousand times as far off."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    expected = a.double() @ b.double()
    return bool((a @ b - expected).norm() / expected.norm() < 1e-6)
