"""The loss of GPUs: its kernel in Triton's interpreter, and how its products are laid out."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import ROOT, succeed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2xla.model import loss
from gpt2xla.model.loss import LOGITS_AT_ONCE, in_place_cross_entropy
from gpt2xla.runtime.torch.accelerators import Cuda

pytest.importorskip("triton")
from gpt2xla.model.fused import cross_entropy


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    command = [sys.executable, "tests/workers/fused_loss_worker.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    return json.loads(succeed(result).splitlines()[-1])


def test_loss_and_gradients_are_as_exact_as_those_of_the_plain_formula(interpreted: dict[str, Any]) -> None:
    # The interpreter cuts digits off where a GPU rounds to bf16.
    allowed = {"fp32": (3, 3e-7), "bf16": (1.1, 2**-8), "fp16": (1.1, 1e-6)}
    cases = {name: found for name, found in interpreted.items() if "fused" in found}
    assert len(cases) == 13
    for name, found in cases.items():
        factor, more = allowed[name[-4:]]
        for fused, plain in zip(found["fused"], found["plain"], strict=True):
            assert fused <= factor * plain + more, (name, found)


def test_ignored_labels_and_padding_have_no_gradient_at_all(interpreted: dict[str, Any]) -> None:
    assert {found["where there is no gradient"] for found in interpreted.values() if "fused" in found} == {0.0}


def test_in_fp16_the_head_learns_from_ids_of_small_probability(interpreted: dict[str, Any]) -> None:
    plain, fused = interpreted["rare ids"]
    assert max(fused) <= 0.01 < min(plain)


def test_sums_for_evaluations_are_exact(interpreted: dict[str, Any]) -> None:
    assert interpreted["sums"]["fp32"] <= 1e-6
    assert interpreted["sums"]["fp16"] <= 1e-3
    assert interpreted["sums"]["bf16"] <= 4e-3


def test_labels_that_are_no_ids_have_an_infinite_loss(interpreted: dict[str, Any]) -> None:
    assert interpreted["wrong labels"] == ["inf"] * 4 + ["0.0"]


class Products(TorchDispatchMode):
    """Counts matrix products, of which `unaligned` had an operand or a result with rows off the grid of 16 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.unaligned = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # torch's own shape rule for addmm with a type and `out` fails
        result = kwargs["out"] if "dtype" in func._overloadname else func(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            matrices = [value for value in (*args, result) if isinstance(value, Tensor)]
            self.count += 1
            self.unaligned += any(
                max(m.stride()) * m.element_size() % 16 or m.storage_offset() * m.element_size() % 16 for m in matrices
            )
        return result


def products(loss_of: Callable[..., Tensor], batch: int, ids: int) -> Products:
    pieces = -(-batch * 1024 * ids * 2 // LOGITS_AT_ONCE["cuda"])
    with torch.device("meta"):
        x, weight = torch.empty(batch, 1024, 768, dtype=torch.bfloat16), torch.empty(ids, 768)
        labels = torch.empty(batch, 1024, dtype=torch.int64)
    with Products() as mode:
        loss_of(x.requires_grad_(), weight.requires_grad_(), labels, chunks=pieces)
    return mode


@pytest.mark.parametrize("ids", [50257, 50304])
def test_rows_of_all_products_are_aligned(ids: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (loss, cross_entropy):  # autocast does not know the meta device
        monkeypatch.setattr(module, "compute_dtype", lambda tensor: tensor.dtype)
    monkeypatch.setattr(cross_entropy, "by_rows", lambda *arguments: None)
    for batch in range(1, 257):
        found = products(cross_entropy.fused_cross_entropy, batch, ids)
        assert found.count >= 3, batch
        assert found.unaligned == 0, batch
    for batch in (1, 33, 64, 255):
        assert products(partial(in_place_cross_entropy, reads_wait=True), batch, ids).unaligned == 0, batch
    odd = products(lambda x, weight, labels, chunks: x[0] @ weight.t().to(x.dtype), 4, ids)
    assert odd.unaligned == (ids == 50257), "a plain product would not be"


@pytest.mark.parametrize("lack", [None, "it needs a C compiler"])
def test_a_gpu_fuses_its_loss_where_triton_works(lack: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "why_not_compiled", lambda self: lack)
    gpu = Cuda.__new__(Cuda)  # which finds no GPU here
    gpu.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu.prepare("highest")
    loss_of, at_once = gpu.chunked_loss(torch.float16)
    assert (loss_of is cross_entropy.fused_cross_entropy) == (lack is None)
    assert (at_once is None) == (lack is not None), "in fp16 torch's operations need all logits at once"
    assert gpu.chunked_loss(torch.bfloat16)[1] == LOGITS_AT_ONCE["cuda"]
    assert (gpu.log_sums() is cross_entropy.fused_log_sums) == (lack is None)
