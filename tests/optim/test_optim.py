"""Clipping and updates against float64, and the optimizers' state carried over by name."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2xla.config import ModelConfig, OptimConfig, TorchConfig, TrainConfig
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.optim.muon import orthogonalized
from gpt2xla.optim.optimizer import clip_gradients, parameter_groups
from gpt2xla.optim.state import export_state
from gpt2xla.runtime.torch.runtime import TorchRuntime

SMALL = ModelConfig(vocab_size=31, seq_length=8, d_model=16, num_layers=2, num_heads=2)


def test_clipping_equals_float64() -> None:
    model = GPT2(SMALL)
    for seed, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    exact = [parameter.grad.double() for parameter in model.parameters()]
    norm = torch.sqrt(sum((g**2).sum() for g in exact))
    assert clip_gradients(model, 0.0).item() == pytest.approx(norm.item(), rel=1e-6)
    assert all(torch.equal(p.grad.double(), g) for p, g in zip(model.parameters(), exact, strict=True)), (
        "0 does not clip"
    )
    clip_gradients(model, 0.25)
    for parameter, gradient in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.grad.double(), gradient * 0.25 / norm, rtol=1e-5, atol=1e-9)


def test_only_matrices_and_embeddings_decay() -> None:
    model = GPT2(SMALL)
    decayed, kept = parameter_groups(model.parameters(), 0.1)
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
        parameter_groups(truth.parameters(), 0.1), lr=0.01, betas=config.betas
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
    state = export_state(model, optimizer)
    torch.save(state, tmp_path / "state.pt")
    saved = {"optimizer": torch.load(tmp_path / "state.pt", weights_only=True), "runtime": {}}
    optimizer = runtime.build_optimizer(model, config, saved)
    for _ in range(3):
        step(optimizer)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), truth.get_parameter(name), rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch's own Muon: torch 2.9 or later")
@pytest.mark.parametrize("stack_bytes", [0, 2**30, 2 * 4 * 48 * 16])
def test_muons_updates_equal_torchs_and_the_state_survives_its_export(
    stack_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps, export through a file, import, three more: as six of torch.optim.Muon, on queries, keys and values as
    matrices of their own, and torch.optim.AdamW, in float64. One by one, stacked, and in several stacks."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.double)  # in which torch's Muon always multiplies
    config = OptimConfig(optim_type="muon", learning_rate=0.01, weight_decay=0.1)
    runtime = TorchRuntime(TorchConfig(), TrainConfig())
    runtime.stack_bytes = stack_bytes
    model = GPT2(dataclasses.replace(SMALL, num_layers=3))
    model.init_weights(torch.Generator().manual_seed(0))
    truth = {
        name: [nn.Parameter(part) for part in p.detach().double().chunk(3 if name.endswith("c_attn.weight") else 1)]
        for name, p in model.named_parameters()
    }
    in_blocks = {name for name in truth if name[:2] == "h." and "ln_" not in name and name.endswith("weight")}
    assert len(in_blocks) == 3 * 4
    plain = [
        torch.optim.Muon(
            [p for name in in_blocks for p in truth[name]], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([truth["wte.weight"][0], truth["wpe.weight"][0]], weight_decay=0.1, betas=config.betas),
        torch.optim.AdamW([p for (p, *_) in truth.values() if p.dim() == 1], weight_decay=0.0, betas=config.betas),
    ]
    generator = torch.Generator().manual_seed(1)
    optimizer: torch.optim.Optimizer | None = None
    for step in range(6):
        if step % 3 == 0:
            if optimizer:
                torch.save({"optimizer": export_state(model, optimizer), "runtime": {}}, tmp_path / "state.pt")
            saved = torch.load(tmp_path / "state.pt", weights_only=True) if optimizer else None
            optimizer = runtime.build_optimizer(model, config, saved)
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            for part, gradient in zip(truth[name], p.grad.double().chunk(len(truth[name])), strict=True):
                part.grad = gradient
        for each in (optimizer, *plain):
            assert each
            for group in each.param_groups:
                group["lr"] = 0.01 / (step + 1)
            each.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), torch.cat(truth[name]), rtol=1e-4, atol=1e-6)
    assert saved["optimizer"].keys() == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}
    assert saved["optimizer"]["momentum_buffer"].keys() == in_blocks
    assert saved["optimizer"]["exp_avg"].keys() == saved["optimizer"]["exp_avg_sq"].keys() == truth.keys() - in_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_orthogonalized_singular_values_are_near_one(dtype: torch.dtype) -> None:
    """0.7 to 1.2 by Jordan's figure of the iteration, for directions that are not all but missing."""
    matrices = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(0))
    for wide in (matrices, matrices.mT):
        u, _, v = torch.linalg.svd(orthogonalized(wide, dtype).double(), full_matrices=False)
        values = (u.mT @ orthogonalized(wide, dtype).double() @ v.mT).diagonal(dim1=1, dim2=2)
        assert 0.65 < values.min() < values.max() < 1.25


class NoReads(TorchDispatchMode):
    """Reading a tensor on the host is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stack_bytes", [0, 2**30])
@pytest.mark.parametrize(
    ("precision", "bad"), [("none", "gradient"), ("none", "infinite gradient"), ("none", "loss"), ("fp16", "gradient")]
)
def test_an_update_that_is_not_finite_changes_no_bit_and_is_never_read(
    precision: str, bad: str, stack_bytes: int
) -> None:
    runtime = TorchRuntime(TorchConfig(), TrainConfig(mixed_precision=precision))  # type: ignore[arg-type]
    runtime.stack_bytes = stack_bytes
    model = GPT2(SMALL)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = runtime.build_optimizer(model, OptimConfig(optim_type="muon"), None)

    def update(loss: float, factor: float) -> list[Tensor]:
        summands = [(p - 2).square().sum() for p in model.parameters()]
        summands[6] = summands[6] * factor  # of a matrix of Muon's
        runtime.backward(torch.stack(summands).sum())
        with NoReads():
            runtime.optimizer_step(model, optimizer, torch.tensor(loss), rate=0.01, max_grad_norm=1.0)
        state = [value for values in optimizer.state.values() for value in values.values()]
        return [tensor.detach().clone() for tensor in (*model.parameters(), *state)]

    good = update(1.0, 1.0)
    factor = {"gradient": math.nan, "infinite gradient": math.inf, "loss": 1.0}[bad]
    left = update(math.nan if bad == "loss" else 1.0, factor)
    assert all(torch.equal(a, b) for a, b in zip(good, left, strict=True))
    moved = update(1.0, 1.0)
    assert not any(torch.equal(a, b) for a, b in zip(good, moved, strict=True))
