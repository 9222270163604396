"""Perplexity of a whole split: each token once on any devices, against Hugging Face's model in float64."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run, run_here, run_xla, succeed, torchrun
from evals.small import MODEL_FLAGS, make_model, make_split, reference_losses
from safetensors.torch import load_file, save_file

from gpt2xla.data.shards import TokenStream
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.evals import row_losses
from gpt2xla.evals.validation import standard_error
from gpt2xla.model.loss import IGNORED_LABEL

Reference = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_split(tmp_path_factory.mktemp("documents") / "data")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def reference(model: Path, split: Path) -> Reference:
    sums, counts = reference_losses(model, split)
    assert counts[-1] < counts[0], "a shorter window at the end"
    assert len(counts) % 4, "batches of 4 do not divide it"
    return sums, counts


@pytest.fixture(scope="module")
def flags(model: Path, split: Path) -> list[object]:
    return [
        "--do-test",
        "--from-checkpoint",
        model,
        "--valid-dir",
        split,
        "--eval-batch-size",
        4,
        "--valid-steps",
        "all",
    ]


@pytest.fixture(scope="module")
def tested(flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, which one process tested a model into, with wandb; what was printed is in printed.txt."""
    folder = tmp_path_factory.mktemp("tested")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    text = succeed(run("run_pretrain.py", *flags, "--checkpoints-dir", folder, "--wandb-logging"))
    (folder / "printed.txt").write_text(text)
    return folder


def logged(folder: Path) -> dict:
    (line,) = (folder / "test.jsonl").read_text().splitlines()
    return json.loads(line)


def assert_whole_split(line: dict, reference: Reference) -> None:
    sums, counts = reference
    assert line["valid_tokens"] == counts.sum()
    assert line["valid_loss"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-6)
    assert line["valid_perplexity"] == pytest.approx(math.exp(sums.sum() / counts.sum()), rel=1e-5)


def test_one_two_and_three_processes_count_each_token_once(
    tested: Path, flags: list[object], reference: Reference, tmp_path: Path
) -> None:
    """Batches of 4 do not divide over 3 processes either."""
    one = logged(tested)
    assert_whole_split(one, reference)
    for processes in (2, 3):
        succeed(torchrun(processes, *flags, "--checkpoints-dir", tmp_path / str(processes)))
        line = logged(tmp_path / str(processes))
        assert_whole_split(line, reference)
        assert line["valid_perplexity"] == pytest.approx(one["valid_perplexity"], rel=1e-6)
    total = f"{reference[1].sum():,}"
    assert f"on {total} tokens" in (tested / "printed.txt").read_text()
    assert f" has {total} to predict" in (tested / "printed.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "layout"), [(1, []), (3, []), (8, ["--spmd"])])
def test_xla_counts_each_token_once(
    devices: int, layout: list[str], flags: list[object], reference: Reference, tmp_path: Path
) -> None:
    result = run_xla(*flags, *layout, "--checkpoints-dir", tmp_path / "c", CPU_NUM_DEVICES=str(devices))
    assert "1 new program" in succeed(result)
    assert "warning: XLA" not in result.stderr
    assert_whole_split(logged(tmp_path / "c"), reference)


def test_bits_per_byte_and_standard_error(tested: Path, reference: Reference, split: Path) -> None:
    """Bytes counted again from the decoded documents."""
    sums, counts = reference
    stream = TokenStream(split)
    text = load_tokenizer("bytes").decode([i for i in stream.read(0, stream.length).tolist() if i != 256])
    bits = sums.sum() / counts.sum() * stream.length / math.log(2)
    line = logged(tested)
    assert line["valid_bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-6)
    assert line["valid_standard_error"] == pytest.approx(jackknife(sums, counts), rel=0.05)


def jackknife(sums: np.ndarray, counts: np.ndarray) -> float:
    """An estimate of the standard error that knows no formula for ratios: the loss without each window in turn."""
    without = np.array([np.delete(sums, i).sum() / np.delete(counts, i).sum() for i in range(len(sums))])
    return math.sqrt((len(sums) - 1) / len(sums) * ((without - without.mean()) ** 2).sum())


def test_the_standard_error_of_equal_windows_is_the_textbooks() -> None:
    sums = np.random.default_rng(0).normal(3000, 300, 50)
    losses = sums / 1024
    padded = np.append(sums, 0.0), np.append(np.full(50, 1024.0), 0.0)
    assert standard_error(*padded) == pytest.approx(losses.std(ddof=1) / math.sqrt(50), rel=1e-12)
    assert standard_error(np.array([3.0]), np.array([1.0])) is None


def test_a_test_leaves_a_runs_log_alone_and_goes_to_wandb(tested: Path, model: Path) -> None:
    assert (tested / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'
    assert logged(tested)["checkpoint"] == str(model)
    (folder,) = (tested / "wandb").glob("offline-run-*")
    assert b"valid_perplexity" in next(folder.glob("*.wandb")).read_bytes()


def test_training_validates_on_all_of_a_split(split: Path, reference: Reference, tmp_path: Path) -> None:
    steps = ["--train-steps", 1, "--warmup-steps", 0, "--train-batch-size", 2, "--gradient-accum-step", 1]
    data = ["--train-dir", split.parent / "train", "--valid-dir", split, "--valid-steps", "all", "--eval-batch-size", 3]
    succeed(run_here("run_pretrain.py", *MODEL_FLAGS, *steps, *data, "--checkpoints-dir", tmp_path))
    *_, line = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["valid_tokens"] == reference[1].sum()
    sums, counts = reference_losses(tmp_path / "step-00000001", split)
    assert line["valid_loss"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-6)


@pytest.mark.parametrize("logits_at_once", [1, 1000, 2**28])
def test_row_losses_in_pieces_equal_cross_entropy_in_float64(
    logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_losses, "_LOGITS_AT_ONCE", logits_at_once)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 7, 5, generator=generator), torch.randn(11, 5, generator=generator)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, 2:] = IGNORED_LABEL
    labels[2] = IGNORED_LABEL
    logits = (x.double() @ weight.double().T).transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED_LABEL).sum(1)
    found = row_losses.row_losses(x, weight, labels)[:, 0]
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-9)


def test_alternatives_of_the_last_label_are_rows_of_their_own() -> None:
    """Of sequences with labels at the end, in the middle, in one place, and nowhere."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(4, 6, 5, generator=generator), torch.randn(11, 5, generator=generator)
    labels = torch.randint(0, 11, (4, 6), generator=generator)
    labels[1, :2], labels[1, 4:], labels[2, 1:], labels[3] = (IGNORED_LABEL,) * 4
    last = torch.randint(0, 11, (4, 3), generator=generator)
    found = row_losses.row_losses(x, weight, labels, last)
    logits = (x.double() @ weight.double().T).transpose(1, 2)
    for number in range(3):
        labels[0, 5], labels[1, 3], labels[2, 0] = last[:3, number]
        expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none").sum(1)
        assert found[:, number].tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)


def test_padding_of_the_vocabulary_has_no_probability() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 5, 8, generator=generator), torch.randn(20, 8, generator=generator)
    labels = torch.randint(17, (2, 5), generator=generator)
    logits = x.double() @ weight[:17].double().T
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
    found = row_losses.row_losses(x, weight, labels, padding=3)[:, 0]
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_padded_model_is_the_same_function(flags: list[object], reference: Reference, tmp_path: Path) -> None:
    sums, counts = reference
    out = succeed(run_here("run_pretrain.py", *flags, "--vocab-size", 512, "--checkpoints-dir", tmp_path))
    assert float(re.search(r"loss ([\d.]+)", out)[1]) == pytest.approx(sums.sum() / counts.sum(), abs=1e-5)


def test_a_loss_that_is_no_number_is_a_failed_run(
    model: Path, flags: list[object], split: Path, tmp_path: Path
) -> None:
    """Of damaged weights, and at the end of a run whose last update took the weights out of fp32."""
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    weights = load_file(damaged / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"][3, 3] = math.nan
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    result = run_here("run_pretrain.py", *flags, "--from-checkpoint", damaged, "--checkpoints-dir", tmp_path / "tested")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "the loss is not a number" in result.stderr
    result = run_here("generate.py", "--model", damaged, "--prompt", "a", "--temperature", 0)
    assert (result.returncode, result.stderr.count("error: ")) == (1, 1)

    steps = ["--train-steps", 1, "--warmup-steps", 0, "--train-batch-size", 2, "--gradient-accum-step", 1]
    data = ["--train-dir", split.parent / "train", "--valid-dir", split, "--learning-rate", 3e37, "--no-compile"]
    result = run_here("run_pretrain.py", *MODEL_FLAGS, *steps, *data, "--checkpoints-dir", tmp_path / "run")
    assert result.returncode == 1
    assert "the loss is not a number" in result.stderr
    assert not list((tmp_path / "run").glob("step-*"))
