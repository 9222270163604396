"""Schedules against their formulas, clipping against float64, and Adam's state carried over by name."""

import math
from pathlib import Path

import pytest
import torch

from gpt2xla import optim
from gpt2xla.config import ModelConfig, OptimConfig, TorchConfig, TrainConfig
from gpt2xla.model import GPT2
from gpt2xla.runtime.torch import TorchRuntime

SMALL = ModelConfig(vocab_size=31, seq_length=8, d_model=16, num_layers=2, num_heads=2)


def test_cosine_schedule() -> None:
    config = OptimConfig(learning_rate=0.1, min_lr=0.01, warmup_steps=10, decay_steps=110)
    rates = [optim.learning_rate(config, 768, step) for step in range(200)]
    assert rates[:10] == pytest.approx([0.01 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(0.1)
    assert rates[60] == pytest.approx(0.055), "half way down"
    assert rates[35] == pytest.approx(0.01 + 0.09 * (1 + math.sqrt(0.5)) / 2), "cos(pi / 4)"
    assert rates[110:] == pytest.approx([0.01] * 90)
    assert max(rates) == pytest.approx(0.1)


def test_noam_schedule() -> None:
    config = OptimConfig(learning_rate=0.5, decay_method="noam", warmup_steps=100)
    for step in (0, 5, 98, 99, 100, 5000):
        n = step + 1
        expected = 0.5 * 512**-0.5 * min(n**-0.5, n * 100**-1.5)
        assert optim.learning_rate(config, 512, step) == pytest.approx(expected)


def test_schedules_without_warm_up_are_finite() -> None:
    for method in ("cosine", "noam"):
        config = OptimConfig(decay_method=method, warmup_steps=0)  # type: ignore[arg-type]
        assert 0 < optim.learning_rate(config, 768, 0) <= config.learning_rate


def test_clipping_equals_float64() -> None:
    model = GPT2(SMALL)
    for seed, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    exact = [parameter.grad.double() for parameter in model.parameters()]
    norm = torch.sqrt(sum((g**2).sum() for g in exact))
    assert optim.clip_gradients(model, 0.0).item() == pytest.approx(norm.item(), rel=1e-6)
    assert all(torch.equal(p.grad.double(), g) for p, g in zip(model.parameters(), exact, strict=True)), (
        "0 does not clip"
    )
    optim.clip_gradients(model, 0.25)
    for parameter, gradient in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.grad.double(), gradient * 0.25 / norm, rtol=1e-5, atol=1e-9)


def test_only_matrices_and_embeddings_decay() -> None:
    model = GPT2(SMALL)
    decayed, kept = optim.parameter_groups(model.parameters(), 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert all(names[id(p)].endswith("weight") and "ln_" not in names[id(p)] for p in decayed["params"])
    assert all(names[id(p)].endswith("bias") or "ln_" in names[id(p)] for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


@pytest.mark.parametrize("optim_type", ["adam", "adamw"])
def test_updates_equal_torchs_and_the_state_survives_its_export(optim_type: str, tmp_path: Path) -> None:
    """Three steps, export through a file, import, three more: as six steps of a plain optimizer in float64."""
    config = OptimConfig(optim_type=optim_type, learning_rate=0.01, weight_decay=0.1)  # type: ignore[arg-type]
    runtime = TorchRuntime(TorchConfig(), TrainConfig())
    model = GPT2(SMALL)
    model.init_weights(torch.Generator().manual_seed(0))
    truth = GPT2(SMALL).double()
    truth.load_state_dict(model.state_dict())
    plain = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optim_type](
        optim.parameter_groups(truth.parameters(), 0.1), lr=0.01, betas=config.betas
    )

    def step(optimizer: torch.optim.Optimizer) -> None:
        for parameter, exact in zip(model.parameters(), truth.parameters(), strict=True):
            exact.grad = exact.detach() * 3 - 1
            parameter.grad = exact.grad.float()
        optimizer.step()
        plain.step()

    optimizer = runtime.build_optimizer(model, config, None)
    for _ in range(3):
        step(optimizer)
    state = optim.export_state(model, optimizer)
    torch.save(state, tmp_path / "state.pt")
    optimizer = runtime.build_optimizer(model, config, torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        step(optimizer)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), truth.get_parameter(name), rtol=1e-4, atol=1e-6)
