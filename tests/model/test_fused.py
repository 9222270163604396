"""Blocks in Triton kernels, in Triton's interpreter: losses and gradients are as exact as those of the plain block."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, succeed


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, tuple[float, float]]]:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/workers/fused_worker.py"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return json.loads(succeed(ended).splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "most"),
    [
        ("two layers", 1e-6),
        ("odd widths, no biases, activation in products", 1e-6),
        ("bf16", 3e-2),
        ("fp16, activation in products", 3e-3),
    ],
)
def test_fused_blocks_compute_what_the_plain_one_does(errors: dict, case: str, most: float) -> None:
    for name, (fused, plain) in errors[case].items():
        assert fused < most, name
        assert name == "loss" or fused < 2 * plain, name  # one loss may be right by chance
