"""One configuration, three ways to run it, and an independent fourth: the same losses; and resumes that are exact.

20 updates of 3 micro-steps with clipping, in fp32, each run started as a user starts it.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, metrics, run, run_here, run_xla, succeed, torchrun, training_losses
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gpt2xla.checkpoint.formats.hf_config import to_hf_config
from gpt2xla.checkpoint.formats.parameter_names import to_hf_state
from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.config import ModelConfig, OptimConfig
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.optim.schedule import learning_rate

RELATIVE = 1e-5


@pytest.fixture(scope="module")
def xla_run(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("xla")
    succeed(run_xla(*data_flags, *SMALL_RUN, "--checkpoints-dir", folder))
    return folder


def weights_of(folder: Path, step: int = 20) -> dict[str, torch.Tensor]:
    return load_file(folder / f"step-{step:08d}" / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = weights_of(a), weights_of(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_losses_equal_hugging_face_and_adamw_in_float64(trained: Path, data: Path) -> None:
    """An independent trainer in thirty lines: Hugging Face's model, torch's optimizer, windows cut by hand."""
    tokens = np.concatenate([np.load(file) for file in sorted((data / "train").glob("*.npy"))]).astype(np.int64)
    start = GPT2(ModelConfig(97, 16, 32, 2, 2))
    start.init_weights(torch.Generator().manual_seed(1061109567))
    model = GPT2LMHeadModel(GPT2Config.from_dict(to_hf_config(start.config))).double()
    model.load_state_dict(to_hf_state(start.config, start.state_dict()), strict=False)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    schedule = OptimConfig(learning_rate=0.01, min_lr=0.001, warmup_steps=0, decay_steps=20)
    expected = []
    for step in range(20):
        windows = [tokens[16 * w : 16 * w + 17] for w in range(12 * step, 12 * step + 12)]
        batch = torch.from_numpy(np.stack(windows))
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, 32, step)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert training_losses(trained) == pytest.approx(expected, rel=RELATIVE)
    assert expected[-1] < expected[0] - 0.5, "a loss that falls, or the comparison would say little"


def test_two_ddp_processes_equal_one(trained: Path, data_flags: list[str], tmp_path: Path) -> None:
    succeed(torchrun(2, *data_flags, *SMALL_RUN, "--checkpoints-dir", tmp_path))
    assert training_losses(tmp_path) == pytest.approx(training_losses(trained), rel=RELATIVE)
    assert validations(tmp_path) == pytest.approx(validations(trained), rel=RELATIVE)


def test_xla_equals_torch(trained: Path, xla_run: Path) -> None:
    assert training_losses(xla_run) == pytest.approx(training_losses(trained), rel=RELATIVE)
    assert validations(xla_run) == pytest.approx(validations(trained), rel=RELATIVE)
    norms = [[line["grad_norm"] for line in metrics(folder) if "loss" in line] for folder in (xla_run, trained)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.slow  # a run that moves from torch continues with it, too
def test_the_sync_free_optimizer_equals_the_plain_one(trained: Path, data_flags: list[str], tmp_path: Path) -> None:
    succeed(run_xla(*data_flags, *SMALL_RUN, "--use-syncfree-optim", "--checkpoints-dir", tmp_path))
    assert training_losses(tmp_path) == pytest.approx(training_losses(trained), rel=RELATIVE)


@pytest.mark.slow  # the quick form is in test_muon.py
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "adamw --use-syncfree-optim"])
def test_a_rate_of_exactly_zero_changes_nothing_on_xla(optimizer: str, data_flags: list[str], tmp_path: Path) -> None:
    """Steps 4 and 5 have a rate of 0, and ids from 97 on occur nowhere, so that their second moments are 0."""
    schedule = "--learning-rate 0.01 --min-lr 0 --decay-steps 3 --warmup-steps 1 --train-steps 5".split()
    flags = [*data_flags, *SMALL_RUN, "--vocab-size", "128", "--no-tie-weights", *schedule, "--optim-type"]
    flags += [*optimizer.split(), "--checkpoints-dir"]
    succeed(run_xla(*flags, tmp_path / "xla"))
    succeed(
        run_here("run_pretrain.py", *(flag for flag in flags if flag != "--use-syncfree-optim"), tmp_path / "torch")
    )
    ours, expected = weights_of(tmp_path / "xla", 5), weights_of(tmp_path / "torch", 5)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)
    assert validations(tmp_path / "xla") == pytest.approx(validations(tmp_path / "torch"), rel=RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["--activation-checkpointing block --loss-chunks 4", "--attention sdpa --loss-chunks 1"]
)
def test_kernels_on_xla_equal_torch(flags: str, trained: Path, data_flags: list[str], tmp_path: Path) -> None:
    succeed(run_xla(*data_flags, *SMALL_RUN, *flags.split(), "--checkpoints-dir", tmp_path))
    assert training_losses(tmp_path) == pytest.approx(training_losses(trained), rel=RELATIVE)


@pytest.mark.slow
def test_kernels_in_ddp_equal_one_process(trained: Path, data_flags: list[str], tmp_path: Path) -> None:
    flags = "--attention chunked --activation-checkpointing block --loss-chunks 4".split()
    succeed(torchrun(2, *data_flags, *SMALL_RUN, *flags, "--checkpoints-dir", tmp_path))
    assert training_losses(tmp_path) == pytest.approx(training_losses(trained), rel=RELATIVE)


@pytest.mark.slow
def test_ddp_on_xla_equals_torch(trained: Path, data_flags: list[str], tmp_path: Path) -> None:
    result = run_xla(*data_flags, *SMALL_RUN, "--ddp", "--checkpoints-dir", tmp_path)
    succeed(result)
    assert "warning: XLA" not in result.stderr
    assert training_losses(tmp_path) == pytest.approx(training_losses(trained), rel=RELATIVE)


def test_a_resumed_torch_run_is_bit_identical(trained: Path, data_flags: list[str], tmp_path: Path) -> None:
    flags = [*data_flags, *SMALL_RUN, "--checkpoints-dir", tmp_path]
    succeed(run_here("run_pretrain.py", *flags, "--train-steps", 10))
    assert "after step 10" in succeed(run("run_pretrain.py", *flags))
    assert training_losses(tmp_path) == training_losses(trained)
    assert validations(tmp_path) == validations(trained)
    assert same_weights(tmp_path, trained)


def test_skipped_updates_are_counted_over_resumes(
    data_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of steps 2, 5 and 6 are NaN. A run that was resumed after step 3 counts them as an unbroken one does."""
    forward, calls = GPT2.forward, itertools.count()

    def spoiled(self: GPT2, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, count = forward(self, *batch)
        return loss * (math.nan if next(calls) // 3 + 1 in (2, 5, 6) else 1), count

    monkeypatch.setattr(GPT2, "forward", spoiled)
    flags = [*data_flags, *SMALL_RUN, "--checkpoints-dir", tmp_path, "--skip-nonfinite"]
    succeed(run_here("run_pretrain.py", *flags, 2, "--train-steps", 3))
    result = run_here("run_pretrain.py", *flags, 2, "--train-steps", 7)
    assert [line["skipped"] for line in metrics(tmp_path) if "loss" in line] == [0, 1, 1, 1, 2]
    assert result.returncode == 1
    assert "step 6: loss nan" in result.stderr


@pytest.mark.slow
def test_a_resumed_run_with_dropout_and_shuffling_is_bit_identical(data_flags: list[str], tmp_path: Path) -> None:
    """On four processes: from three on the order of summation shows, which DDP changes after its first step."""
    flags = [*data_flags, *SMALL_RUN, "--dropout", "0.2", "--shuffle"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    succeed(torchrun(4, *flags, "--checkpoints-dir", unbroken))
    succeed(torchrun(4, *flags, "--checkpoints-dir", broken, "--train-steps", 10))
    succeed(torchrun(4, *flags, "--checkpoints-dir", broken))
    assert training_losses(broken) == training_losses(unbroken)
    assert same_weights(broken, unbroken)


def test_a_resumed_xla_run_is_bit_identical(xla_run: Path, data_flags: list[str], tmp_path: Path) -> None:
    flags = [*data_flags, *SMALL_RUN, "--checkpoints-dir", tmp_path]
    succeed(run_xla(*flags, "--train-steps", 10))
    succeed(run_xla(*flags))
    assert training_losses(tmp_path) == training_losses(xla_run)
    assert same_weights(tmp_path, xla_run)


@pytest.mark.parametrize("first", [pytest.param("torch", marks=pytest.mark.slow), "xla"])
def test_a_run_moves_between_runtimes(
    first: str, trained: Path, xla_run: Path, data_flags: list[str], tmp_path: Path
) -> None:
    """The other runtime continues a run from step 10. The sync-free optimizer lays the same state out differently."""
    source = (trained if first == "torch" else xla_run) / "step-00000010"
    flags = [*data_flags, *SMALL_RUN, "--from-checkpoint", source, "--checkpoints-dir", tmp_path]
    succeed(run_xla(*flags, "--use-syncfree-optim") if first == "torch" else run("run_pretrain.py", *flags))
    assert training_losses(tmp_path) == pytest.approx(training_losses(trained)[10:], rel=RELATIVE)


def test_a_model_saved_on_xla_loads_in_torch_and_hugging_face_and_back(xla_run: Path, tmp_path: Path) -> None:
    folder = xla_run / "step-00000020"
    config, weights = load_weights(folder)
    ours = build_model(config, weights, folder).eval()
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(32).view(2, 16)
    torch.testing.assert_close(theirs(ids).logits, ours.logits(ids), rtol=0, atol=1e-5)
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert config.tie_weights
    assert "lm_head.weight" not in weights
    theirs.save_pretrained(tmp_path)
    _, back = load_weights(tmp_path)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_weights_stay_tied_on_xla(xla_run: Path, trained: Path) -> None:
    """Untied, the head would stop learning with the embedding: 20 updates later the two would differ."""
    name = "transformer.wte.weight"
    torch.testing.assert_close(weights_of(xla_run)[name], weights_of(trained)[name], rtol=1e-3, atol=1e-5)


def validations(folder: Path) -> list[float]:
    return [line["valid_loss"] for line in metrics(folder) if "valid_loss" in line]
