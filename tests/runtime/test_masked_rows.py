"""Training on masked rows: each update is that of its conversations one by one, on every runtime."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, metrics, random_samples, run_here, run_xla, succeed, torchrun, training_losses
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2xla.checkpoint.formats.hf_config import to_hf_config
from gpt2xla.checkpoint.formats.parameter_names import to_hf_state
from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.config import ModelConfig, TrainConfig
from gpt2xla.data.preparation.rows import write_rows
from gpt2xla.data.shards import MANIFEST
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.evals.perplexity_table import best_of, measure
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.loss import IGNORED_LABEL
from gpt2xla.runtime.one_device import OneDevice

EOT, LENGTH, ROWS = 256, 16, 48  # rows per update
MODEL = ModelConfig(vocab_size=257, seq_length=LENGTH, d_model=32, num_layers=2, num_heads=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for split, count in (("train", 700), ("test", 60)):
        samples = random_samples(count, longest=15, seed=count)
        write_rows(folder / split, samples, load_tokenizer("bytes"), row_length=LENGTH, shard_size=1001)
    return folder


@pytest.fixture(scope="module")
def flags(data: Path) -> list[str]:
    """Updates of 2 x 24 rows, without clipping, so that Adam's first moment tells the gradient."""
    more = "--vocab-size 257 --train-batch-size 24 --gradient-accum-step 2 --max-grad-norm 0 --betas 0.5 0.95"
    more += " --train-steps 4 --valid-interval 2 --save-interval 1 --eval-batch-size 8 --valid-steps all"
    return ["--train-dir", str(data / "train"), "--valid-dir", str(data / "test"), *SMALL_RUN, *more.split()]


@pytest.fixture(scope="module")
def trained(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, succeed(run_here("run_pretrain.py", *flags, "--checkpoints-dir", folder))


def conversations(split: Path, rows: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ids and labels (1, T) of each conversation of the first rows, cut out by hand; padding has no label."""
    entries = json.loads((split / MANIFEST).read_text())["shards"]
    shards = [np.load(split / entry["file"]) for entry in entries]
    masks = [np.unpackbits(np.fromfile((split / e["file"]).with_suffix(".mask"), np.uint8)) for e in entries]
    tokens = np.concatenate(shards).astype(np.int64)
    trained = np.concatenate([mask[: len(shard)] for mask, shard in zip(masks, shards, strict=True)])
    end = len(tokens) - 1 if rows is None else rows * LENGTH
    starts = [*np.flatnonzero(tokens[:end] == EOT), end]
    for start, stop in itertools.pairwise(starts):
        ids = torch.from_numpy(tokens[start:stop])[None]
        yield ids, torch.where(torch.from_numpy(trained[start:stop])[None] == 1, ids, IGNORED_LABEL)


def loss_of(model: GPT2LMHeadModel, split: Path, rows: int | None = None) -> torch.Tensor:
    """Return the mean loss of all labels, of each conversation alone."""
    losses, counted = [], 0
    for ids, labels in conversations(split, rows):
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum"))
        counted += int((labels != IGNORED_LABEL).sum())
    return torch.stack(losses).nansum() / counted


def hugging_face(state: dict[str, torch.Tensor]) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(GPT2Config.from_dict(to_hf_config(MODEL))).double()
    model.load_state_dict(to_hf_state(MODEL, state), strict=False)
    return model


@pytest.fixture(scope="module")
def expected(data: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and gradients of the first update, from transformers in float64."""
    start = GPT2(MODEL)
    start.init_weights(torch.Generator().manual_seed(1061109567))
    model = hugging_face(start.state_dict())
    loss = loss_of(model, data / "train", ROWS)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_first_update(folder: Path, expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    loss, gradients = expected
    assert abs(training_losses(folder)[0] - loss) <= 1e-6 * loss
    state = torch.load(folder / "step-00000001" / "training_state.pt", weights_only=True)["optimizer"]["exp_avg"]
    ours = to_hf_state(MODEL, {name: moment / 0.5 for name, moment in state.items()})
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-4, "or the comparison would say little"
        assert (ours[name] - gradient).abs().max() <= 1e-6, name


def test_updates_and_validation_are_those_of_conversations_one_by_one(
    trained: tuple[Path, str], data: Path, expected: tuple[float, dict[str, torch.Tensor]]
) -> None:
    """Documents are kept apart unasked, and what a run says of its data is what was counted by hand."""
    folder, shown = trained
    check_first_update(folder, expected)
    last = folder / "step-00000004"
    with torch.no_grad():
        valid_loss = loss_of(hugging_face(build_model(*load_weights(last), last).state_dict()), data / "test").item()
    line = [line for line in metrics(folder) if "valid_loss" in line][-1]
    assert line["valid_loss"] == pytest.approx(valid_loss, rel=1e-6)
    assert line["valid_bits_per_byte"] is None
    tokens, counted = 0, 0
    for ids, labels in conversations(data / "train"):
        tokens, counted = tokens + ids.numel(), counted + int((labels != IGNORED_LABEL).sum())
    assert f"data: {tokens + 1:,} tokens ({counted / tokens:.1%} count, in rows of 16) to train on" in shown
    assert "kernels: kept attention, loss in 1 piece, document mask\n" in shown
    assert json.loads((last / "run_config.json").read_text())["document_mask"] is True
    tested = succeed(run_here("run_pretrain.py", "--do-test", "--from-checkpoint", folder, "--valid-steps", "all"))
    assert f"loss {line['valid_loss']:.6f}" in tested
    assert " within documents; " in tested


def test_the_table_measures_any_model_on_conversations_alone(
    trained: tuple[Path, str], data: Path, tmp_path: Path
) -> None:
    """Also one that was made for longer sequences, and without --document-mask."""
    last = trained[0] / "step-00000004"
    torch.manual_seed(0)
    other = GPT2LMHeadModel(GPT2Config.from_dict(to_hf_config(MODEL) | {"n_positions": 40}))
    other.save_pretrained(tmp_path)
    train = TrainConfig(valid_steps="all", eval_batch_size=8)
    models = {"run": last, "other": tmp_path}
    ours, others = measure(models, str(data / "test"), train, OneDevice(torch.device("cpu")))
    line = [line for line in metrics(trained[0]) if "valid_loss" in line][-1]
    assert ours.validation.loss == pytest.approx(line["valid_loss"], rel=1e-6)
    with torch.no_grad():
        assert others.validation.loss == pytest.approx(loss_of(other.double(), data / "test").item(), rel=1e-6)
    assert (others.seq_length, others.within_documents, others.validation.bits_per_byte) == (16, True, None)
    best = best_of([ours, others])
    assert best is ours, "they compare"


def test_a_resumed_run_is_bit_identical(trained: tuple[Path, str], flags: list[str], tmp_path: Path) -> None:
    succeed(run_here("run_pretrain.py", *flags, "--train-steps", 1, "--checkpoints-dir", tmp_path))
    succeed(run_here("run_pretrain.py", *flags, "--checkpoints-dir", tmp_path))
    assert training_losses(tmp_path) == training_losses(trained[0])
    ours, theirs = (load_file(f / "step-00000004" / "model.safetensors") for f in (tmp_path, trained[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_row_length_and_the_document_mask_follow_the_data(data: Path, flags: list[str], tmp_path: Path) -> None:
    """Unless they are given: another length is refused, and no mask stays no mask when the run is resumed."""
    place = flags.index("--seq-length")
    more = ["--train-steps", "1", "--save-interval", "0", "--checkpoints-dir", str(tmp_path / "run")]
    refused = run_here("run_pretrain.py", *flags, *more, "--seq-length", "32")
    (line,) = [line for line in refused.stderr.splitlines() if "error:" in line]
    assert refused.returncode == 2
    assert (
        f"--seq-length 32: --train-dir {data / 'train'} was prepared in rows of 16 tokens; use --seq-length 16" in line
    )
    assert not (tmp_path / "run").exists()
    without = [*flags[:place], *flags[place + 2 :], *more]
    shown = succeed(run_here("run_pretrain.py", *without, "--no-document-mask"))
    assert "sequences: 16 tokens, as the rows of --train-dir have (--seq-length)" in shown
    assert "attention reaches from one into the next (--no-document-mask)" in shown
    shown = succeed(run_here("run_pretrain.py", *without, "--train-steps", "2"))
    assert "document mask" not in shown.split("kernels:")[1].split("batch:")[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["2", "3", "2 --fsdp", "2 --zero1"])
def test_several_processes_make_the_same_updates(
    layout: str,
    trained: tuple[Path, str],
    flags: list[str],
    expected: tuple[float, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    processes, *more = layout.split()
    succeed(torchrun(int(processes), *flags, *more, "--checkpoints-dir", tmp_path))
    check_first_update(tmp_path, expected)
    same_as(trained[0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["", "--spmd", "--spmd --fsdp"])
def test_xla_makes_the_same_updates_with_two_graphs(
    layout: str,
    trained: tuple[Path, str],
    flags: list[str],
    expected: tuple[float, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    devices = {"CPU_NUM_DEVICES": "8"} if layout else {}
    result = run_xla(*flags, *layout.split(), "--checkpoints-dir", tmp_path, **devices)
    succeed(result)
    if "fsdp" not in layout:  # whose moments are stored in parts
        check_first_update(tmp_path, expected)
    same_as(trained[0], tmp_path)
    assert "warning: XLA" not in result.stderr
    assert [line["compiles"] for line in metrics(tmp_path) if "compiles" in line][-1] == 2


def same_as(folder: Path, other: Path) -> None:
    assert training_losses(other) == pytest.approx(training_losses(folder), rel=1e-5)
    losses = [[line["valid_loss"] for line in metrics(f) if "valid_loss" in line] for f in (folder, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
