"""--neftune-alpha: the noise follows the uniform law, and is a function of seed and row alone, on every device."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, metrics, require_xla, run, run_here, run_xla, succeed, torchrun, training_losses
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpt2xla.config import ModelConfig
from gpt2xla.model.embedding_noise import embedding_noise
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Kernels

LENGTH, WIDTH, ALPHA = 64, 48, 5.0
LIMIT = ALPHA / math.sqrt(LENGTH * WIDTH)
SEED = torch.tensor(12345.0)


def ids_of(rows: int) -> Tensor:
    return torch.randint(0, 50257, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def noise_of(ids: Tensor, seed: Tensor = SEED) -> Tensor:
    """In units of its limit."""
    return embedding_noise(ids, seed, ALPHA, WIDTH).double() / LIMIT


def in_numpy(ids: np.ndarray, seed: int) -> np.ndarray:
    """The same in unsigned integers, as the hash is published."""

    def mixed(x: np.ndarray) -> np.ndarray:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x ^ (x >> np.uint32(16))

    row = mixed(mixed(ids.astype(np.uint32)) + np.arange(LENGTH, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
    key = mixed(row ^ np.uint32(seed))[:, None]
    bits = mixed(mixed(np.arange(LENGTH * WIDTH, dtype=np.uint32) + key) ^ mixed(key + np.uint32(0x9E3779B9)))
    whole = (bits.view(np.int32) >> 8).astype(np.float64) * 2 + 1
    return (whole.astype(np.float32) * np.float32(LIMIT / 2**24)).reshape(-1, LENGTH, WIDTH)


def test_it_is_the_published_hash() -> None:
    ids = ids_of(5)
    for seed in (0, 12345, 2**24 - 1):
        ours = embedding_noise(ids, torch.tensor(float(seed)), ALPHA, WIDTH)
        assert np.array_equal(ours.numpy(), in_numpy(ids.numpy(), seed))


def test_it_follows_the_uniform_law() -> None:
    """Each figure within four of its standard errors, of 1.5 million draws; and none beyond the limit."""
    draws = noise_of(ids_of(500)).flatten()
    count = draws.numel()
    assert draws.abs().max() < 1
    assert draws.abs().max() > 1 - 20 / count
    assert abs(draws.mean()) < 4 * math.sqrt(1 / 3 / count)
    assert abs(draws.var() - 1 / 3) < 4 * math.sqrt((1 / 5 - 1 / 9) / count)
    in_bins = torch.histc(draws, 100, -1, 1)
    chi_squared = ((in_bins - count / 100) ** 2 / (count / 100)).sum()
    assert abs(chi_squared - 99) < 4 * math.sqrt(2 * 99)
    below = torch.sort(draws).values
    ranks = (torch.arange(count) + 0.5) / count
    assert ((below + 1) / 2 - ranks).abs().max() < 1.95 / math.sqrt(count), "Kolmogorov-Smirnov at 0.1%"


def test_neighbours_rows_and_steps_are_uncorrelated() -> None:
    ids = ids_of(300)
    draws = noise_of(ids)
    other_id = ids.clone()
    other_id[:, 17] += 1
    pairs = {
        "along the width": (draws[..., 1:], draws[..., :-1]),
        "along the row": (draws[:, 1:], draws[:, :-1]),
        "rows": (draws[1:], draws[:-1]),
        "the next step": (draws, noise_of(ids, SEED + 1)),
        "a row with one other id": (draws, noise_of(other_id)),
        "the same ids in another order": (draws, noise_of(ids.flip(1))),
    }
    for name, (a, b) in pairs.items():
        correlation = 3 * (a * b).mean()
        assert abs(correlation) < 4 / math.sqrt(a.numel()), name
        assert abs(3 * (a * b[..., :1]).mean()) < 4 / math.sqrt(a.numel()), name


def test_a_row_gets_the_same_wherever_it_is() -> None:
    """In any batch, at any place of it: no process and no split into micro-steps changes it."""
    ids = ids_of(8)
    whole = embedding_noise(ids, SEED, ALPHA, WIDTH)
    order = torch.tensor([3, 1, 7, 0])
    assert torch.equal(embedding_noise(ids[order], SEED, ALPHA, WIDTH), whole[order])
    assert torch.equal(embedding_noise(ids[5:6].to(torch.int32), SEED.int(), ALPHA, WIDTH), whole[5:6])


def test_xla_equals_torch_to_the_bit(tmp_path: Path) -> None:
    require_xla()
    ids, seeds = ids_of(6), [torch.tensor(float(seed)) for seed in (0, 1, 12345, 2**24 - 1)]
    torch.save({"ids": ids, "seeds": seeds, "alpha": ALPHA, "width": WIDTH}, tmp_path / "given.pt")
    result = run("tests/workers/noise_worker.py", tmp_path / "given.pt", tmp_path / "noise.pt", PJRT_DEVICE="CPU")
    succeed(result)
    for seed, theirs in zip(seeds, torch.load(tmp_path / "noise.pt"), strict=True):
        assert torch.equal(theirs, embedding_noise(ids, seed, ALPHA, WIDTH))


def model_of(kernels: Kernels) -> GPT2:
    model = GPT2(ModelConfig(vocab_size=97, seq_length=16, d_model=32, num_layers=2, num_heads=2))
    model.init_weights(torch.Generator().manual_seed(3))
    model.kernels, model.neftune_alpha = kernels, 5.0
    return model.double()


def test_the_model_adds_it_to_token_embeddings_in_training_alone() -> None:
    """Loss and gradients are those of a model whose embedding is looked up and disturbed by hand, also where blocks are
    computed twice; whatever is not `forward` with a seed has no noise."""
    ids = torch.randint(0, 97, (3, 17), generator=torch.Generator().manual_seed(1))
    inputs, labels = ids[:, :-1], ids[:, 1:]
    plain = model_of(Kernels())
    x_BTD = plain.wte(inputs) + embedding_noise(inputs, SEED, 5.0, 32) + plain.wpe.weight
    for block in plain.h:
        x_BTD = block(x_BTD, plain.kernels)
    logits = plain.ln_f(x_BTD) @ plain.wte.weight.T
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    for kernels in (Kernels(), Kernels(checkpoint=partial(checkpoint, use_reentrant=False))):
        model = model_of(kernels)
        loss, _ = model(inputs, labels, SEED)
        loss.backward()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (ours.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm(), name
    without = model_of(Kernels())
    without.neftune_alpha = 0.0
    assert torch.equal(model(inputs, labels)[0], without(inputs, labels)[0])
    assert torch.equal(model.logits(inputs), without.logits(inputs))
    assert abs(loss / without(inputs, labels)[0] - 1) > 1e-4, "or the comparison would say little"


@pytest.fixture(scope="module")
def noisy(data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noisy")
    shown = succeed(run_here("run_pretrain.py", *noisy_flags(data_flags), "--checkpoints-dir", folder))
    assert ", NEFTune alpha 5\n" in shown
    return folder


def noisy_flags(data_flags: list[str]) -> list[str]:
    return [*data_flags, *SMALL_RUN, "--train-steps", "6", "--valid-interval", "3", "--neftune-alpha", "5"]


def validations(folder: Path) -> list[float]:
    return [line["valid_loss"] for line in metrics(folder) if "valid_loss" in line]


def test_a_resumed_run_is_bit_identical(noisy: Path, data_flags: list[str], tmp_path: Path) -> None:
    flags = [*noisy_flags(data_flags), "--checkpoints-dir", tmp_path]
    succeed(run_here("run_pretrain.py", *flags, "--train-steps", 3))
    succeed(run_here("run_pretrain.py", *data_flags, "--checkpoints-dir", tmp_path, "--train-steps", 6))
    assert training_losses(tmp_path) == training_losses(noisy)
    weights, unbroken = (load_file(folder / "step-00000006" / "model.safetensors") for folder in (tmp_path, noisy))
    assert all(torch.equal(weights[name], unbroken[name]) for name in unbroken)


def test_another_split_into_micro_steps_has_the_same_noise(noisy: Path, data_flags: list[str], tmp_path: Path) -> None:
    split = ["--train-batch-size", 6, "--gradient-accum-step", 2, "--checkpoints-dir", tmp_path]
    succeed(run_here("run_pretrain.py", *noisy_flags(data_flags), *split))
    assert training_losses(tmp_path) == pytest.approx(training_losses(noisy), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["", "--spmd", "--spmd --fsdp", "--activation-checkpointing block", "--ddp"])
def test_a_run_on_xla_equals_torch(layout: str, noisy: Path, data_flags: list[str], tmp_path: Path) -> None:
    devices = {"CPU_NUM_DEVICES": "4"} if "spmd" in layout else {}
    result = run_xla(*noisy_flags(data_flags), *layout.split(), "--checkpoints-dir", tmp_path, **devices)
    succeed(result)
    assert training_losses(tmp_path) == pytest.approx(training_losses(noisy), rel=1e-5)
    assert validations(tmp_path) == pytest.approx(validations(noisy), rel=1e-5)
    assert "warning: XLA" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["", "--fsdp", "--zero1 --activation-checkpointing block", "--compile"])
def test_two_processes_equal_one(layout: str, noisy: Path, data_flags: list[str], tmp_path: Path) -> None:
    succeed(torchrun(2, *noisy_flags(data_flags), *layout.split(), "--checkpoints-dir", tmp_path))
    assert training_losses(tmp_path) == pytest.approx(training_losses(noisy), rel=1e-5)
    assert validations(tmp_path) == pytest.approx(validations(noisy), rel=1e-5)
