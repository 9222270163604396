"""Blocks in Triton kernels, in Triton's interpreter: losses and gradients are as exact as those of the plain block."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT, succeed

from gpt2xla.config import ModelConfig, RunConfig, TorchConfig
from gpt2xla.model.gpt2 import GPT2, Block
from gpt2xla.model.kernels import Fused, Kernels
from gpt2xla.model.norm import plain_layer_norm
from gpt2xla.runtime.torch.accelerators import Cpu
from gpt2xla.runtime.torch.runtime import TorchRuntime


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
        ("within documents", 1e-6),
        ("bf16", 3e-2),
        ("fp16, activation in products", 3e-3),
    ],
)
def test_fused_blocks_compute_what_the_plain_one_does(errors: dict, case: str, most: float) -> None:
    for name, (fused, plain) in errors[case].items():
        assert fused < most, name
        assert name == "loss" or fused < 2 * plain, name  # one loss may be right by chance


@pytest.mark.parametrize(
    ("options", "dropout", "used"),
    [
        ({}, 0.0, "fused, measured"),
        ({"attention": "sdpa", "compile": False}, 0.0, "fused, measured"),
        ({"deterministic": True}, 0.0, "fused"),
        ({"train_steps": 1}, 0.0, "fused"),
        ({}, 0.1, None),
        ({"compile": True}, 0.0, None),
        ({"attention": "chunked"}, 0.0, None),
    ],
)
def test_fused_blocks_are_used_where_they_compute_what_was_asked(
    monkeypatch: pytest.MonkeyPatch, options: dict, dropout: float, used: str | None
) -> None:
    """What is measured at start may differ from run to run, so `--deterministic` does not measure."""

    def fused_blocks(device: Cpu, model: ModelConfig, tokens: int, dtype: torch.dtype, *, measures: bool) -> Fused:
        assert (tokens, dtype) == (4 * 8, torch.float32)
        return Fused(lambda block, x, mask: x, lambda x, norm: x, "fused" + ", measured" * measures)

    monkeypatch.setattr(Cpu, "fused_blocks", fused_blocks)
    monkeypatch.setattr(Cpu, "compile_pays_from", 1e7)
    config = RunConfig.from_flat({"train_batch_size": 4, "train_steps": 100, "mixed_precision": "none", **options})
    try:
        runtime = TorchRuntime(TorchConfig(), config.train, "cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    model = GPT2(ModelConfig(vocab_size=31, seq_length=8, d_model=8, num_layers=1, num_heads=2, dropout=dropout))
    runtime.setup_model(model)
    assert (model.kernels.block is not None) == (used is not None)
    assert not used or model.kernels.description.endswith(f", {used}")
    assert not used or model.kernels.compiled is None


@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1.1, False), (float("nan"), False), ("x", False)])
def test_fused_blocks_that_fail_or_compute_something_else_are_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, factor: Any, agrees: bool
) -> None:
    def fused_blocks(device: Cpu, *args: object, **kwargs: object) -> Fused | None:
        def block(module: Block, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return module(x, Kernels()) + (factor - 1) * x

        return Fused(block, plain_layer_norm, "fused") if device.has_fused else None

    monkeypatch.setattr(Cpu, "fused_blocks", fused_blocks)
    monkeypatch.setattr(Cpu, "has_fused", True)
    config = RunConfig.from_flat({"train_batch_size": 4, "train_steps": 1, "mixed_precision": "none"})
    model = GPT2(ModelConfig(vocab_size=31, seq_length=8, d_model=8, num_layers=1, num_heads=2))
    TorchRuntime(TorchConfig(), config.train, "cpu").setup_model(model)
    assert (model.kernels.block is not None) == agrees
    assert ("note: training without fused kernels" in capsys.readouterr().err) != agrees
