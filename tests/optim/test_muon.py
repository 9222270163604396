"""--optim-type muon: one run on every runtime, checkpoints that move between them, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN, metrics, run, run_here, run_xla, succeed, torchrun, training_losses
from safetensors.torch import load_file

from gpt2xla.checkpoint import folder as checkpoint
from gpt2xla.checkpoint import seal
from gpt2xla.checkpoint.start import find_start
from gpt2xla.cli import parse_run
from gpt2xla.config import TorchConfig
from gpt2xla.errors import InputError

RELATIVE = 1e-5


@pytest.fixture(scope="module")
def flags(data_flags: list[str]) -> list[str]:
    """Of a run whose learning rate falls to exactly 0, which would be another graph if it were a constant of it, and would
    make NaN of the rows of ids from 97 on, which occur nowhere."""
    return [
        *data_flags,
        *SMALL_RUN,
        "--vocab-size",
        "128",
        "--no-tie-weights",
        "--decay-steps",
        "18",
        "--min-lr",
        "0",
        "--optim-type",
        "muon",
        "--checkpoints-dir",
    ]


@pytest.fixture(scope="module")
def torch_run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch")
    succeed(run_here("run_pretrain.py", *flags, folder))
    return folder


@pytest.fixture(scope="module")
def xla_run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xla")
    succeed(run_xla(*flags, folder))
    return folder


def compiles(folder: Path) -> int:
    return [line["compiles"] for line in metrics(folder) if "compiles" in line][-1]


def test_a_resumed_run_is_bit_identical(torch_run: Path, flags: list[str], tmp_path: Path) -> None:
    succeed(run_here("run_pretrain.py", *flags, tmp_path, "--train-steps", 10))
    assert "after step 10" in succeed(run("run_pretrain.py", "--checkpoints-dir", tmp_path, "--train-steps", 20))
    assert training_losses(tmp_path) == training_losses(torch_run)
    ours, theirs = (load_file(folder / "step-00000020" / "model.safetensors") for folder in (tmp_path, torch_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_xla_equals_torch_in_two_graphs(torch_run: Path, xla_run: Path) -> None:
    assert training_losses(xla_run) == pytest.approx(training_losses(torch_run), rel=RELATIVE)
    assert compiles(xla_run) == 2
    ours, theirs = (load_file(folder / "step-00000020" / "model.safetensors") for folder in (xla_run, torch_run))
    for name, weight in theirs.items():
        # By matrix: Adam divides by a gradient's size, so that single elements with hardly any gradient differ by more.
        assert (ours[name] - weight).norm() < 1e-3 * weight.norm(), name


@pytest.mark.parametrize(
    ("devices", "layout"),
    [
        pytest.param(4, ["--spmd", "--fsdp"], marks=pytest.mark.slow),
        pytest.param(1, ["--use-syncfree-optim"], marks=pytest.mark.slow),
        pytest.param(1, [], marks=pytest.mark.slow),
        pytest.param(2, [], marks=pytest.mark.slow),
        pytest.param(4, ["--spmd", "--use-syncfree-optim"], marks=pytest.mark.slow),
    ],
)
def test_torchs_run_resumes_on_xla(
    devices: int, layout: list[str], torch_run: Path, flags: list[str], tmp_path: Path
) -> None:
    """And the state that is saved there is torch's at the same step."""
    source = torch_run / "step-00000010"
    succeed(run_xla(*flags, tmp_path, "--from-checkpoint", source, *layout, CPU_NUM_DEVICES=str(devices)))
    assert training_losses(tmp_path) == pytest.approx(training_losses(torch_run)[10:], rel=RELATIVE)
    assert compiles(tmp_path) == (2 if devices == 2 else 1), "the training step's; validation follows the last one"
    assert (tmp_path / "step-00000020" / checkpoint.SHARDS).exists() == ("--fsdp" in layout)
    saved, expected = (optimizer_state(folder) for folder in (tmp_path, torch_run))
    assert saved.keys() == expected.keys()
    for name, buffer in expected["momentum_buffer"].items():
        torch.testing.assert_close(saved["momentum_buffer"][name], buffer, rtol=1e-3, atol=1e-6)


def optimizer_state(root: Path) -> dict:
    training = find_start(parse_run(TorchConfig, ["--checkpoints-dir", str(root)])[0]).training
    assert training is not None
    return training["optimizer"]


@pytest.mark.slow
def test_two_processes_continue_the_run_of_one(torch_run: Path, flags: list[str], tmp_path: Path) -> None:
    """As DDP, with --zero1 and with --fsdp: each makes half of the matrices orthogonal, and keeps half of their momentum."""
    more = [*flags[:-1], "--from-checkpoint", torch_run / "step-00000010"]
    succeed(torchrun(2, tmp_path, *more, program="tests/workers/muon_worker.py"))
    expected = optimizer_state(torch_run)
    half = sum(buffer.numel() for buffer in expected["momentum_buffer"].values()) // 2
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for name in ("ddp", "zero1", "fsdp"):
        assert training_losses(tmp_path / name) == pytest.approx(training_losses(torch_run)[10:], rel=RELATIVE), name
        assert [report[name] for report in reports] == [half, half], name
        saved = optimizer_state(tmp_path / name)
        assert saved.keys() == expected.keys()
        for key, buffer in expected["momentum_buffer"].items():
            torch.testing.assert_close(saved["momentum_buffer"][key], buffer, rtol=1e-3, atol=1e-6)
    assert all(report["largest_difference"] < 1e-6 for report in reports)


def test_xlas_run_resumes_in_torch(torch_run: Path, xla_run: Path, flags: list[str], tmp_path: Path) -> None:
    succeed(run_here("run_pretrain.py", *flags, tmp_path, "--from-checkpoint", xla_run / "step-00000010"))
    assert training_losses(tmp_path) == pytest.approx(training_losses(torch_run)[10:], rel=RELATIVE)


def test_another_optimizers_state_is_refused_in_one_line(torch_run: Path, trained: Path, tmp_path: Path) -> None:
    flags = ["--checkpoints-dir", tmp_path / "new", "--from-checkpoint"]
    for source, asked, trained_with in ((torch_run, "adamw", "muon"), (trained, "muon", "adamw")):
        result = run_here("run_pretrain.py", *flags, source, "--optim-type", asked)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert f"--optim-type {asked} cannot use the state of {trained_with}" in line
        start = find_start(
            parse_run(TorchConfig, [*map(str, flags), str(source), "--optim-type", asked, "--resume", "never"])[0]
        )
        assert (start.step, start.config.optim.optim_type) == (0, asked), "its weights are anyone's"
    assert not (tmp_path / "new").exists()
    start = find_start(parse_run(TorchConfig, [*map(str, flags), str(trained), "--optim-type", "adam"])[0])
    assert start.step == 20, "adam and adamw have the same state"


def test_a_checkpoint_without_muons_state_is_refused(torch_run: Path) -> None:
    folder = torch_run / "step-00000010"
    file = folder / checkpoint.TRAINING_STATE
    training = torch.load(file, weights_only=True)
    buffers = training["optimizer"]["momentum_buffer"]
    buffers["h.0.attn.c_attn.weight"] = buffers["h.0.attn.c_attn.weight"][:-1]
    torch.save(training, file)
    seal.seal(folder, 10)
    with pytest.raises(InputError, match="does not hold the state of this model's training"):
        find_start(parse_run(TorchConfig, ["--checkpoints-dir", str(torch_run), "--resume", str(folder)])[0])
