"""The TPU kernels of flash attention, interpreted on a CPU, against attention in float64."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor
from workers import jax_literals

from gpt2xla.model.attention import sdpa_attention
from gpt2xla.model.documents import document_mask, document_starts
from gpt2xla.model.pallas_attention import backward, forward
from gpt2xla.model.pallas_attention_shape import Shape
from gpt2xla.model.pallas_lowering import lower

jax_literals.told_apart()
SHAPES = [
    Shape(2, 256, 4, 64),
    Shape(1, 512, 3, 64),
    Shape(1, 128, 2, 32),
    Shape(1, 512, 2, 128),
    Shape(1, 512, 3, 64, "TPU v4"),
    Shape(1, 128, 2, 32, "TPU v4"),
    Shape(1, 256, 3, 64, "TPU v3"),
    Shape(3, 1024, 2, 64, documents=True),
    Shape(1, 256, 1, 128, documents=True),
    Shape(1, 256, 1, 64, "TPU v3", documents=True),
]
LONGER = [Shape(1, 1024, 3, 64), Shape(1, 768, 3, 64, "TPU v4"), Shape(3, 768, 2, 64, "TPU v4", documents=True)]
# The first tokens of documents in each row: on a chunk's border and beside it, of one token, and none at all. Each number of
# keys that a chunk of 256 may look at is taken by some row.
STARTS = [[1, 255, 256, 257, 300, 767, 900], [0, 511, 512, 1000], []]


def inputs(shape: Shape) -> list[np.ndarray]:
    numbers = np.random.default_rng(0)
    return [numbers.standard_normal((shape.B, shape.T, shape.D)).astype(jnp.bfloat16) for _ in range(4)]


def starts_of(shape: Shape) -> Tensor:
    ids = torch.zeros(shape.B, shape.T, dtype=torch.int64)
    for row, starts in zip(ids, STARTS, strict=False):
        row[[start for start in starts if start < shape.T]] = 1
    return document_starts(ids, 1)


def by_torch(arrays: list[np.ndarray], shape: Shape, dtype: torch.dtype) -> list[np.ndarray]:
    q, k, v, dy = (torch.tensor(array.astype(np.float64), dtype=dtype) for array in arrays)
    leaves: list[Tensor] = [x.requires_grad_() for x in (q, k, v)]
    mask = document_mask(starts_of(shape), dtype) if shape.documents else None
    y = sdpa_attention(*leaves, shape.H, mask_B1TS=mask)
    y.backward(dy)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [x.detach().double().numpy() for x in (y, *gradients)]


@pytest.mark.parametrize(
    "shape", [*SHAPES, *(pytest.param(shape, marks=pytest.mark.slow) for shape in LONGER)], ids=str
)
def test_values_and_gradients(shape: Shape) -> None:
    """An odd number of heads leaves half of the last block outside the arrays, as gpt2-xl's 25 do."""
    q, k, v, dy = arrays = inputs(shape)
    starts = starts_of(shape)[:, None].numpy()
    documents = [starts[..., :: shape.queries_per_chunk], starts] if shape.documents else []
    y, log_sums = forward(shape, interpret=True)(*documents, q, k, v)
    gradients, sums = backward(shape, interpret=True)(*documents, q, k, v, y, log_sums, dy)
    results = [y, *gradients]
    exact, plain = by_torch(arrays, shape, torch.float64), by_torch(arrays, shape, torch.bfloat16)
    for name, ours, theirs, expected in zip(("y", "dq", "dk", "dv"), results, plain, exact, strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - expected) / np.linalg.norm(expected)
        bf16 = np.linalg.norm(theirs - expected) / np.linalg.norm(expected)
        print(f"{shape} {name}: {error:.2e}, torch in bf16 {bf16:.2e}")
        assert error <= 1.05 * bf16, "no less exact than torch's own in bf16"
    dq_sum, dk_sum, dv_sum = np.moveaxis(np.asarray(sums, np.float64), 1, 0)
    for name, ours, place in (("dq", dq_sum, 1), ("dv", dv_sum, 3)):
        expected = exact[place].sum(1)
        error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        bf16 = np.linalg.norm(plain[place].sum(1) - expected) / np.linalg.norm(expected)
        print(f"{shape} sum of {name}: {error:.2e}, torch in bf16 {bf16:.2e}")
        assert error <= bf16
    assert not dk_sum.any(), "softmax does not see a bias of k"


def test_the_kernels_are_lowered_without_a_device() -> None:
    for kernel in (forward, backward):
        for device_kind in ("TPU v3", "TPU v4", "TPU v5 lite"):
            for documents in (False, True):
                shape = Shape(2, 256, 4, 64, device_kind, documents)
                assert "custom_call_config" in json.loads(lower(kernel(shape)))


@pytest.mark.parametrize(
    ("shape", "supported"),
    [
        (Shape(1, 1024, 12, 64), True),
        (Shape(1, 1000, 12, 64), False),
        (Shape(1, 4096, 12, 64), False),
        (Shape(1, 128, 2, 48), False),
        (Shape(1, 2048, 2, 64), True),
        (Shape(1, 2048, 2, 64, "TPU v3"), False),
    ],
)
def test_which_shapes_are_supported(shape: Shape, supported: bool) -> None:
    assert shape.supported == supported
