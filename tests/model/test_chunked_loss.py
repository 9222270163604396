"""The loss of compiled devices, whose exponentials are shifted by the label's logit: against float64, up to 200 nats."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2xla.model.loss import IGNORED_LABEL, MOST_ABOVE_LABEL, chunked_cross_entropy

PADDING, IDS, LABEL = 3, 40, 7
CHUNKED = partial(chunked_cross_entropy, chunks=3)


def rows() -> tuple[Tensor, Tensor]:
    """Return logits in float64 (rows, IDS), and how many nats the label's stands below the largest (rows)."""
    generator, below = torch.Generator().manual_seed(0), [0.0, 10.0, 40.0, 60.0, 70.0, 100.0, 200.0]
    rows = []
    for one_id in (True, False):
        for nats in below:
            row = torch.randn(IDS, generator=generator).double()
            if one_id:  # is as far above the label; the others are close to it
                row[3] = row.max() + nats
                row[LABEL] = row[3] - nats
            else:  # are above it
                row[LABEL] = row.max() - nats
            rows.append(row)
    for nats in (100.0, 200.0):  # by which the label is above all others
        row = torch.randn(IDS, generator=generator).double()
        row[LABEL] = row.max() + nats
        rows.append(row)
    # The same numbers in fp32 and float64
    return torch.stack(rows).float().double(), torch.tensor([*below, *below, -100.0, -200.0])


def exact_loss(x_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor, padding: int) -> Tensor:
    logits_BTV = (x_BTD @ head_VD.T)[..., : len(head_VD) - padding]
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="sum")


def loss_and_gradients(loss_of: object, logits: Tensor, label: int, dtype: torch.dtype) -> list[Tensor]:
    """Return the loss of one row in nats, and its gradients by x and the head. The head is the identity, so that x holds the
    logits."""
    x, head = logits[None, None].to(dtype).requires_grad_(), torch.eye(IDS, dtype=dtype).requires_grad_()
    loss = loss_of(x, head, torch.tensor([[label]]), PADDING)  # type: ignore[operator]
    return [value.detach().double() for value in (loss, *torch.autograd.grad(loss, (x, head)))]


def test_exact_up_to_60_nats_and_where_the_label_is_certain() -> None:
    for logits, below in zip(*rows(), strict=True):
        if below <= 60:
            exact = loss_and_gradients(exact_loss, logits, LABEL, torch.float64)
            found = loss_and_gradients(CHUNKED, logits, LABEL, torch.float32)
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_further_below_logits_count_as_if_they_were_capped() -> None:
    for logits, below in zip(*rows(), strict=True):
        capped = torch.minimum(logits, logits[LABEL] + MOST_ABOVE_LABEL)[: IDS - PADDING]
        loss, dx, dhead = loss_and_gradients(CHUNKED, logits, LABEL, torch.float32)
        torch.testing.assert_close(loss, capped.logsumexp(0) - logits[LABEL], rtol=1e-6, atol=1e-6)
        expected = torch.zeros(IDS, dtype=torch.float64)
        expected[: IDS - PADDING] = capped.softmax(0)
        expected[LABEL] -= 1
        torch.testing.assert_close(dx[0, 0], expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(dhead, expected[:, None] * logits, rtol=1e-4, atol=1e-4)
        true = logits[: IDS - PADDING].logsumexp(0) - logits[LABEL]
        assert loss <= true + 1e-5, below


def test_without_a_gradient_every_loss_is_exact() -> None:
    logits, _ = rows()
    labels = torch.full((1, len(logits)), LABEL)
    expected = exact_loss(logits[None], torch.eye(IDS).double(), labels, PADDING)
    with torch.no_grad():
        loss = CHUNKED(logits[None].float().requires_grad_(), torch.eye(IDS).requires_grad_(), labels, PADDING)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_ignored_labels_and_padding_have_gradients_of_exactly_zero() -> None:
    for logits in rows()[0]:
        loss, dx, dhead = loss_and_gradients(CHUNKED, logits, IGNORED_LABEL, torch.float32)
        assert loss == 0
        assert not dx.any()
        assert not dhead.any()
        assert not loss_and_gradients(CHUNKED, logits, LABEL, torch.float32)[2][IDS - PADDING :].any()


@pytest.mark.parametrize("size", [1e3, 3e4, 1e5])
def test_logits_of_any_size_in_bf16_leave_numbers(size: float) -> None:
    """The product rounds them to bf16, the label's own is exact: there they are hundreds of nats apart."""
    x = torch.full((1, 2, 1), size, requires_grad=True)
    head = torch.tensor([[1.003], [-1.0], [0.5]], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(x, head, torch.tensor([[0, 1]]), chunks=1)
    for value in (loss, *torch.autograd.grad(loss, (x, head))):
        assert value.isfinite().all()
