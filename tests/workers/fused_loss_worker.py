"""Run by test_fused_loss.py with TRITON_INTERPRET=1: the loss in Triton's interpreter beside the plain formula.

Prints a JSON object of what the tests ask for. Distances are relative to float64, of the loss and the gradients of x and the
head."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpt2xla.model.fused import cross_entropy
from gpt2xla.model.fused.cross_entropy import by_rows, fused_cross_entropy, fused_log_sums
from gpt2xla.model.loss import IGNORED_LABEL, plain_cross_entropy, space_for_logits

Loss = Callable[..., Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Shapes of x, ids, how many of them are padding, and the largest logit
CASES = {
    "one token": ((1, 1), 64, 0, 5.0),
    "odd rows": ((2, 9), 211, 13, 5.0),
    "two pieces": ((2, 66), 41, 0, 5.0),
    "four blocks": ((1, 4), 1001, 300, 5.0),
    "far apart": ((1, 9), 211, 13, 200.0),
}


def sum_products(
    total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, beta: int = 1, alpha: int = 1, out: Tensor
) -> Tensor:
    """Compute torch.addmm with `out_dtype`, which torch has only for CUDA."""
    product = a.to(dtype) @ b.to(dtype)
    return out.copy_(total + product if beta else product)


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor]:
    shape, ids, padding, largest = CASES[name]
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*shape, 16, generator=generator), torch.randn(ids, 16, generator=generator)
    labels = torch.randint(ids - padding, shape, generator=generator)
    if shape[1] > 1:
        labels[0, 1], labels[-1, 2:5] = IGNORED_LABEL, IGNORED_LABEL
    return x * (largest / (x @ weight.T).abs().max()), weight, labels


def compute(
    loss_of: Loss, tensors: tuple[Tensor, ...], padding: int, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss and gradients in float64, as of fp32 weights whose products are in `dtype`."""
    x, weight, labels = tensors
    own = [t.to(dtype if dtype == torch.float64 else torch.float32).requires_grad_() for t in (x, weight)]
    with torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2):
        loss = loss_of(*own, labels, padding)
    dx, dweight = torch.autograd.grad(loss * scale, own)
    return loss.detach().double(), dx.double() / scale, dweight.double() / scale


def distances(values: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    return [((value - true).norm() / true.norm()).item() for value, true in zip(values, exact, strict=True)]


def rare_ids() -> tuple[list[float], list[float]]:
    """Return the relative errors, of the head's gradient in fp16, in the rows of ids with probabilities of 1e-8 to 1e-7, as
    the plain formula and the kernel compute them: with a loss scale of 65,536, and half a million tokens per update."""
    weight = torch.linspace(-18.4, -16.1, 40)[:, None] * torch.eye(1, 16)
    weight[0] = 0  # the label's
    tensors = torch.eye(1, 16).expand(1, 6, 16), weight, torch.zeros(1, 6, dtype=torch.int64)
    exact = compute(plain_cross_entropy, tensors, 0, torch.float64)[2][1:, 0]
    errors = []
    for loss_of in (plain_cross_entropy, partial(fused_cross_entropy, chunks=1)):
        found = compute(loss_of, tensors, 0, torch.float16, scale=65_536 / 500_000)[2][1:, 0]
        errors.append(((found - exact) / exact).abs().tolist())
    return errors[0], errors[1]


def sums() -> dict[str, float]:
    """Return the largest relative error of the sums that evaluations use, by type."""
    x, weight, _ = inputs("odd rows")
    padding, errors = CASES["odd rows"][2], {}
    for kind, dtype in DTYPES.items():
        x, weight = x.to(dtype), weight.to(dtype)
        exact = (x.double() @ weight.double().T)[..., :-padding].logsumexp(-1)
        errors[kind] = ((fused_log_sums(x, weight, padding) - exact) / exact).abs().max().item()
    return errors


def of_wrong_labels() -> list[str]:
    logits = space_for_logits(torch.empty(5, 16), 211, 1)[:, :211].normal_()
    by_rows(logits, losses := torch.empty(5), 13, torch.tensor([211 - 13, 211, 10**9, -1, IGNORED_LABEL]))
    return [str(value) for value in losses.tolist()]


def main() -> None:
    library = torch.library.Library("aten", "IMPL")  # as long as this object lives
    library.impl("addmm.dtype_out", sum_products, "CPU")
    cross_entropy._THREADS = 32  # so that few ids are several blocks
    results: dict[str, Any] = {"rare ids": rare_ids(), "sums": sums(), "wrong labels": of_wrong_labels()}
    for name, (_, _, padding, _) in CASES.items():
        tensors = inputs(name)
        exact = compute(plain_cross_entropy, tensors, padding, torch.float64)
        for kind, dtype in DTYPES.items():
            if name == "two pieces" and kind != "fp16":  # its many rows take the interpreter seconds
                continue
            fused = compute(partial(fused_cross_entropy, chunks=2), tensors, padding, dtype)
            nothing = fused[1][tensors[2] == IGNORED_LABEL], fused[2][len(fused[2]) - padding :]
            results[f"{name}, {kind}"] = {
                "plain": distances(compute(plain_cross_entropy, tensors, padding, dtype), exact),
                "fused": distances(fused, exact),
                "where there is no gradient": sum(t.abs().sum().item() for t in nothing),
            }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
