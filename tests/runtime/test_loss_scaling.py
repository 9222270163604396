"""fp16 on XLA: the scaler follows torch.amp.GradScaler's rule, skips what overflowed, and never asks the host."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL_RUN, metrics, run, run_here, run_xla, succeed, training_losses
from torch import Tensor, nn

from gpt2xla.config import TrainConfig
from gpt2xla.errors import RunFailed
from gpt2xla.runtime.xla.scaler import LossScaler, step_unless
from gpt2xla.training.run_log import RunLog

FP16 = ["--mixed-precision", "fp16"]
MUON = "--optim-type muon --use-syncfree-optim"


def saved(folder: Path, step: int = 20) -> dict:
    return torch.load(folder / f"step-{step:08d}" / "training_state.pt", weights_only=True)


def on_device(tensor: Tensor) -> Tensor:
    return tensor


def test_the_scale_follows_torchs_rule() -> None:
    """Against torch's own kernel, over updates of which a fifth overflow, from a scale that grows to the end of fp32."""
    scaler = LossScaler(on_device)
    scaler.load_state_dict(
        {"scale": 2.0**120, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2, "_growth_tracker": 1}
    )
    scale, tracker = torch.tensor(2.0**120), torch.tensor(1, dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    reached = set()
    for update in range(300):
        bad = update > 40 and torch.rand((), generator=generator).item() < 0.2
        norm = torch.tensor([math.inf, math.nan][update % 2] if bad else 1.0)
        assert scaler.follow(norm).item() == bad
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(bad)), 2.0, 0.5, 2)
        state = scaler.state_dict()
        assert (state["scale"], state["_growth_tracker"]) == (scale.item(), tracker.item())
        reached.add(scale.item())
    assert max(reached) == 2.0**127
    assert len(reached) > 5


def test_its_state_is_gradscalers() -> None:
    state = LossScaler(on_device).state_dict()
    assert state == torch.amp.GradScaler("cpu").state_dict()


def test_unscaling_gives_the_gradients_of_the_unscaled_loss() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    scaler = LossScaler(on_device)
    scaler.scale(model(x).square().sum()).backward()
    scaler.unscale_(torch.optim.SGD(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_step_is_made_or_leaves_everything() -> None:
    def trained(skips: list[bool]) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for skip in [False, *skips]:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, math.nan if skip else 0.5)
            step_unless(torch.tensor(float(skip)), optimizer)
        return [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]

    for ours, theirs in zip(trained([True, False, True]), trained([False]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture(
    scope="module",
    params=[
        "--use-syncfree-optim",
        *(pytest.param(flags, marks=pytest.mark.slow) for flags in ("--no-use-syncfree-optim", MUON)),
    ],
)
def overflowing(
    request: pytest.FixtureRequest, data_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict:
    folder = tmp_path_factory.mktemp("overflowing")
    flags = [*data_flags, *SMALL_RUN, *FP16, *request.param.split(), "--checkpoints-dir", folder]
    result = run_xla("xla", *flags, program="tests/workers/overflow_worker.py")
    return json.loads(succeed(result).splitlines()[-1]) | {"folder": folder, "optimizer": request.param.split()[:-1]}


def test_overflowing_updates_are_skipped_as_torch_skips_them(
    overflowing: dict, data_flags: list[str], tmp_path: Path
) -> None:
    """Two runs whose scale begins at 2^30, on XLA and on torch with GradScaler: skips, scales, and losses between them."""
    flags = [*data_flags, *SMALL_RUN, *FP16, *overflowing["optimizer"], "--checkpoints-dir", tmp_path]
    succeed(run("tests/workers/overflow_worker.py", "torch", *flags))
    folder = overflowing["folder"]
    skipped = [line["grad_norm"] is None for line in metrics(folder) if "loss" in line]
    assert skipped == [line["grad_norm"] is None for line in metrics(tmp_path) if "loss" in line]
    assert skipped[0], "or nothing is tested"
    assert 3 < sum(not skip for skip in skipped) < 20
    assert any(skipped[skipped.index(False) :]), "it overflows again after growing"
    assert saved(folder)["runtime"] == saved(tmp_path)["runtime"]
    assert saved(folder)["optimizer"]["step"] == saved(tmp_path)["optimizer"]["step"] == skipped.count(False)
    assert training_losses(folder) == pytest.approx(training_losses(tmp_path), rel=1e-3)


def test_a_skip_is_the_same_graph_and_reads_nothing(overflowing: dict) -> None:
    validations, saves = 2, 2
    assert overflowing["end"]["compiles"] == 2
    assert overflowing["end"]["executions"] == 20 + validations * 3
    assert overflowing["readers"] == ["reader"]
    reads_per_save = 6 + bool(overflowing["optimizer"])  # weights, moments, the step count, scale and growth tracker
    assert overflowing["end"]["reads"] == 20 + validations * 3 + saves * reads_per_save


@pytest.mark.slow
def test_fp16_follows_fp32_and_moves_between_runtimes(trained: Path, data_flags: list[str], tmp_path: Path) -> None:
    flags = [*data_flags, *SMALL_RUN, *FP16, "--checkpoints-dir"]
    succeed(run_xla(*flags, tmp_path / "a", "--train-steps", 10))
    succeed(run_here("run_pretrain.py", *flags, tmp_path / "a"))
    succeed(run_here("run_pretrain.py", *flags, tmp_path / "b", "--train-steps", 10))
    succeed(run_xla(*flags, tmp_path / "b", "--use-syncfree-optim"))
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert training_losses(folder) == pytest.approx(training_losses(trained), rel=1e-3)
        state = saved(folder)["runtime"]["scaler"]
        assert (state["scale"], state["_growth_tracker"]) == (65536.0, 20)


def test_gradients_that_overflow_at_every_scale_end_the_run() -> None:
    """Forty in a row may be the scale's; one finite gradient begins another row."""
    order = SimpleNamespace(describe=lambda step: "windows")
    log = RunLog(TrainConfig(mixed_precision="fp16"), None, order, None, None, None, None)
    for norm in [math.inf] * 40 + [1.0] + [math.nan] * 40:
        log._count_skipped(1, 2.0, norm)
    with pytest.raises(RunFailed, match="gradient norm inf"):
        log._count_skipped(1, 2.0, math.inf)
    assert log.skipped == 1
