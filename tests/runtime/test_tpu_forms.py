"""What TPUs compute in their own way, by interpreted kernels on the CPU of XLA: flash attention with its projection, and
trainings with all of it."""

import json

import pytest
import torch
from conftest import run_xla, succeed


def test_within_documents_over_two_devices_as_exact_as_torchs_own_in_bf16() -> None:
    output = succeed(run_xla(program="tests/workers/flash_worker.py", CPU_NUM_DEVICES="2"))
    errors = json.loads(output.splitlines()[-1])
    assert errors.pop("bias of k") == 0, "softmax does not see it"
    assert [list(case) for case in errors.values()] == [["y", "x", "weight", "bias"], ["y", "x", "weight"]]
    for name, case in errors.items():
        for key, (ours, plain) in case.items():
            assert ours <= 1.05 * plain, f"{name}, {key}: {ours}, torch's own in bf16 {plain}"


@pytest.mark.parametrize("all_cases", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_blocks_whose_products_are_kernels_are_the_same_function(all_cases: bool) -> None:
    """In fp32 loss and gradients are those of float64, up to fp32's rounding; in bf16 no further than the plain model's."""
    output = succeed(run_xla(int(all_cases), program="tests/workers/block_worker.py"))
    errors = json.loads(output.splitlines()[-1])
    assert len(errors) == (7 if all_cases else 2)
    for case, of in errors.items():
        for name, (ours, plain) in of.items():
            assert ours <= (2e-6 if "fp32" in case else 1.1 * plain + 1e-6), f"{case}, {name}: {ours}, plain {plain}"


@pytest.mark.slow
def test_200_updates_take_the_plain_steps_way() -> None:
    """Over three seeds: in fp32 the same losses; in bf16 none further from those in fp32 than the plain step's are."""

    def curves(precision: str) -> dict[str, torch.Tensor]:
        output = succeed(run_xla(precision, 200, *range(3), program="tests/workers/forms_worker.py"))
        return {name: torch.tensor(losses).double() for name, losses in json.loads(output.splitlines()[-1]).items()}

    in_fp32, in_bf16 = curves("fp32"), curves("bf16")
    exact = in_fp32.pop("plain")
    different = {name: (losses / exact - 1).abs().max().item() for name, losses in in_fp32.items()}
    apart = {name: (losses - exact).square().mean(1).sqrt() for name, losses in in_bf16.items()}
    print(f"losses {exact[:, 0].tolist()} to {exact[:, -1].tolist()}; fp32, relative: {different}")
    print(f"bf16, nats from fp32: { ({name: distances.tolist() for name, distances in apart.items()}) }")
    assert (exact[:, -1] < exact[:, 0] - 2).all(), "the model learns"
    assert different.keys() == {"transposed", "blocks"}
    assert max(different.values()) <= 1e-5
    assert apart.keys() == {"plain", "transposed", "rows", "blocks"}
    for name, distances in apart.items():
        assert distances.sum() <= 1.05 * apart["plain"].sum(), name
