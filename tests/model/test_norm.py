"""The layer norm of compiled devices against float64, in rows with means and outliers as trained models have, and larger."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gpt2xla.model.norm import lean_layer_norm, plain_layer_norm

WIDTH = 768


def rows(mean: float, outlier: float) -> Tensor:
    """Return rows (64, D) with this mean and a standard deviation of 2, beside columns that stand out as GPT-2's do."""
    x = 2 * torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)) + mean
    x[:, 447] += outlier
    x[:, [138, 378]] -= outlier / 4
    x[0] *= 10  # as a text's first token
    return x


def results(norm_of: object, x: Tensor, dtype: torch.dtype, bf16: bool = False) -> list[Tensor]:
    """Return the value and the gradients by x, weight and bias, in float64."""
    generator = torch.Generator().manual_seed(1)
    norm, own = nn.LayerNorm(WIDTH).to(dtype), x.to(dtype).requires_grad_()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter += 0.3 * torch.randn(WIDTH, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = norm_of(own, norm)  # type: ignore[operator]
    dy = torch.randn(y.shape, generator=generator).bfloat16()
    return [v.detach().double() for v in (y, *torch.autograd.grad(y, (own, *norm.parameters()), dy.to(y.dtype)))]


@pytest.mark.parametrize("outlier", [0.0, 3000.0])
@pytest.mark.parametrize("mean", [0.0, 2.0, 60.0, 200.0])
def test_as_exact_as_bf16_allows(mean: float, outlier: float) -> None:
    """The distances are those of rounding alone, in bf16; in fp32 they are torch's own."""
    x = rows(mean, outlier)
    exact = results(plain_layer_norm, x, torch.float64)
    for bf16, most in ((True, 3e-3), (False, None)):
        lean = results(lean_layer_norm, x, torch.float32, bf16)
        torchs = results(plain_layer_norm, x, torch.float32)
        for name, ours, theirs, true in zip(("y", "x", "weight", "bias"), lean, torchs, exact, strict=True):
            error, of_torch = ((found - true).norm() / true.norm() for found in (ours, theirs))
            assert error <= (most or 1.5 * of_torch + 1e-6), f"{name}: {error}, torch's in fp32 {of_torch}"


def test_rows_without_variance_are_numbers() -> None:
    x = torch.tensor([[0.0], [1.0], [-300.0], [1e4]]).expand(4, WIDTH).clone()
    for value in results(lean_layer_norm, x, torch.float32, bf16=True):
        assert value.isfinite().all()
