"""benchmarks/gpu_bytes.py, by bytes counted by hand. On the CPU: torch's operations are the same there."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from gpu_bytes import Counter, triton_accesses  # noqa: E402

sys.path.pop()  # its generation.py would hide tests/generation

VOCABULARY = 96


def counted(program) -> dict[tuple[str, str], tuple[float, float]]:
    """Return bytes and operations by part and operation."""
    counter = Counter(VOCABULARY, device="cpu")
    with counter:
        program()
    return {name: (work.bytes, work.flops) for name, work in counter.update.work.items()}


def test_bytes_of_torch_operations_are_inputs_read_plus_outputs_written():
    a, b, logits = torch.zeros(8, 16), torch.zeros(16, 32), torch.zeros(8, VOCABULARY, dtype=torch.bfloat16)
    out, table, ids = torch.zeros(8, 32), torch.zeros(1000, 16), torch.zeros(5, dtype=torch.int64)
    a_bytes, b_bytes, out_bytes, logits_bytes = 4 * 8 * 16, 4 * 16 * 32, 4 * 8 * 32, 2 * 8 * VOCABULARY
    product, flops = a_bytes + b_bytes + out_bytes, 2 * 8 * 16 * 32
    rest = "embedding, rest"
    assert counted(lambda: a @ b) == {("products", "mm"): (product, flops)}
    assert counted(lambda: torch.mm(a, b, out=out)) == {("products", "mm"): (product, flops)}
    assert counted(lambda: a.mul_(2.0)) == {(rest, "mul_"): (2 * a_bytes, 0)}
    assert counted(lambda: out.copy_(out.clone().t().contiguous().view(8, 32)))[(rest, "copy_")] == (2 * out_bytes, 0)
    assert counted(lambda: a.view(16, 8)[:4].t().expand(2, 8, 4)) == {}
    assert counted(lambda: a[:, :1].expand(8, 16).neg()) == {(rest, "neg"): (4 * 8 + a_bytes, 0)}
    assert counted(lambda: torch.nn.functional.embedding(ids, table)) == {
        (rest, "embedding"): (5 * 8 + 2 * 4 * 5 * 16, 0)
    }
    assert counted(lambda: logits.neg()) == {("loss", "neg"): (2 * logits_bytes, 0)}


def test_products_with_odd_rows_are_told_apart():
    counter = Counter(VOCABULARY, device="cpu")
    with counter:
        torch.zeros(8, 16, dtype=torch.bfloat16) @ torch.zeros(16, 7, dtype=torch.bfloat16)
        torch.zeros(8, 16, dtype=torch.bfloat16) @ torch.zeros(16, 32, dtype=torch.bfloat16)
    assert counter.update.part("products").unaligned == 2 * 8 * 16 * 7


def test_what_follows_the_backward_pass_is_the_optimizer():
    pytest.importorskip("triton", reason="its launches are counted too")
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    counter = Counter(VOCABULARY, device="cpu")
    with counter.counting():
        (weight * 2).sum().backward()
        weight.data.add_(1.0)
    assert {name for part, name in counter.update.work if part == "optimizer"} == {"add_"}
    assert counter.update.part("optimizer").bytes == 2 * 4 * 16


class Kernel:
    """As Triton holds the function that it compiles."""

    def __init__(self, fn):
        self.fn = fn


def test_a_triton_kernel_moves_what_its_source_loads_and_stores():
    def rows(logits, labels, losses, unused, stride, BLOCK):  # never called: it is only read
        base = logits + tl.program_id(0) * stride  # noqa: F821
        label = tl.load(labels + tl.program_id(0))  # noqa: F821
        for start in range(0, stride, BLOCK):
            at = base + start
            x = tl.load(at)  # noqa: F821
            tl.store(at, x - label)  # noqa: F821
        tl.atomic_add(losses, label)  # noqa: F821

    loaded, stored = triton_accesses(Kernel(rows))
    assert loaded >= {"logits", "labels", "losses"}
    assert stored >= {"logits", "losses"}
    assert "labels" not in stored
    assert "unused" not in loaded | stored
