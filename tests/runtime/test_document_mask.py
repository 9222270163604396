"""Runs with --document-mask: what they measure, on all runtimes, and what they refuse."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, metrics, run_here, run_xla, succeed, torchrun, training_losses, write_split

from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.config import TrainConfig
from gpt2xla.data.documents.corpus import local_parts
from gpt2xla.data.preparation.pipeline import PrepareConfig, prepare
from gpt2xla.data.shards import MANIFEST
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.evals.perplexity_table import measure
from gpt2xla.runtime.one_device import OneDevice

END, LENGTH = 256, 16  # the id of <|endoftext|> in bytes, and the windows'


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 1 to 40 bytes: most windows have several."""
    folder = tmp_path_factory.mktemp("documents")
    lengths = np.random.default_rng(0).integers(1, 41, 300)
    (folder / "texts.txt").write_text("\n".join("abcdefgh"[n % 7 :] * 5 + "z" * int(n) for n in lengths))
    config = PrepareConfig(output_dir=str(folder / "data"), seed=0, test_fraction=0.2)
    prepare(local_parts([folder / "texts.txt"], split_by="line"), load_tokenizer("bytes"), config)
    return folder / "data"


@pytest.fixture(scope="module")
def flags(data: Path) -> list[str]:
    more = ["--vocab-size", "257", "--train-steps", "4", "--valid-steps", "all", "--document-mask"]
    more += ["--train-batch-size", "8", "--eval-batch-size", "8", "--gradient-accum-step", "2"]
    return ["--train-dir", str(data / "train"), "--valid-dir", str(data / "test"), *SMALL_RUN, *more]


@pytest.fixture(scope="module")
def trained(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, succeed(run_here("run_pretrain.py", *flags, "--checkpoints-dir", folder))


def losses_of_documents(checkpoint: Path, tokens: np.ndarray) -> Iterator[float]:
    """Yield the summed loss of each document of each window, computed alone in float64."""
    model = build_model(*load_weights(checkpoint), checkpoint).double()
    for first in range(0, len(tokens) - 1, LENGTH):
        window = torch.from_numpy(tokens[first : first + LENGTH + 1].astype(np.int64))
        cuts = sorted({0, *torch.nonzero(window[:-1] == END)[:, 0].tolist(), len(window) - 1})
        for start, stop in itertools.pairwise(cuts):
            logits = model.logits(window[None, start:stop])[0]
            labels = window[start + 1 : stop + 1]
            yield torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()


@torch.no_grad()
def test_validation_is_that_of_documents_one_by_one(trained: tuple[Path, str], data: Path) -> None:
    """In training, with --do-test and in the table, each of which finds in the checkpoint how it was trained."""
    folder, shown = trained
    assert re.search(r"kernels: .*, document mask\n", shown)
    checkpoint = folder / "step-00000004"
    tokens = np.concatenate([np.load(file) for file in sorted((data / "test").glob("*.npy"))])
    expected = sum(losses_of_documents(checkpoint, tokens)) / (len(tokens) - 1)
    assert [line["valid_loss"] for line in metrics(folder) if "valid_loss" in line] == pytest.approx(
        [expected], rel=1e-5
    )
    tested = succeed(run_here("run_pretrain.py", "--do-test", "--from-checkpoint", folder, "--valid-steps", "all"))
    assert " within documents; " in tested
    assert json.loads((folder / "test.jsonl").read_text())["valid_loss"] == pytest.approx(expected, rel=1e-5)
    train = TrainConfig(valid_steps="all", eval_batch_size=8)
    (row,) = measure({"run": checkpoint}, str(data / "test"), train, OneDevice(torch.device("cpu")))
    assert row.validation.loss == pytest.approx(expected, rel=1e-5)
    plain = ["--no-document-mask", "--valid-steps", "all", "--checkpoints-dir", folder.parent / "plain"]
    succeed(run_here("run_pretrain.py", "--do-test", "--from-checkpoint", folder, *plain))
    unmasked = json.loads((folder.parent / "plain" / "test.jsonl").read_text())["valid_loss"]
    assert abs(unmasked / expected - 1) > 1e-3, "or the comparison would say little"


def test_a_resumed_run_keeps_it_and_reports_a_change(
    trained: tuple[Path, str], flags: list[str], tmp_path: Path
) -> None:
    without = [flag for flag in flags if flag != "--document-mask"]
    without += ["--checkpoints-dir", str(tmp_path), "--from-checkpoint", str(trained[0])]
    assert ", document mask\n" in succeed(run_here("run_pretrain.py", *without, "--train-steps", "5"))
    shown = succeed(run_here("run_pretrain.py", *without, "--train-steps", "6", "--no-document-mask"))
    assert "changed: --document-mask True -> False" in shown
    assert "document mask" not in shown.split("kernels:")[1]


def test_without_an_end_of_text_it_is_refused(data: Path, flags: list[str], tmp_path: Path) -> None:
    """By nobody's word, by a tokenizer without one, and by manifests that contradict each other."""
    tokens = np.concatenate([np.load(file) for file in sorted((data / "train").glob("*.npy"))])
    for split in ("train", "test"):
        write_split(tmp_path / "plain" / split, tokens)
    (tmp_path / "manifests").mkdir()

    def refused(folder: Path) -> str:
        more = ["--train-dir", folder / "train", "--valid-dir", folder / "test", "--checkpoints-dir", tmp_path / "run"]
        result = run_here("run_pretrain.py", *flags, *more)
        assert result.returncode == 2, result.stderr
        (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
        assert not (tmp_path / "run").exists()
        return line

    assert "--document-mask: neither a manifest nor a tokenizer says which id" in refused(tmp_path / "plain")
    manifest = json.loads((data / "train" / MANIFEST).read_text())
    for train_id, says in ((255, "different end-of-text ids"), (None, "different"), (300, "no end-of-text token")):
        folder = tmp_path / f"with {train_id}"
        for split, eot_id in (("train", train_id), ("test", 300 if train_id == 300 else END)):
            (folder / split).mkdir(parents=True)
            for file in (data / split).glob("*.npy"):
                (folder / split / file.name).symlink_to(file)
            values = json.loads((data / split / MANIFEST).read_text())
            (folder / split / MANIFEST).write_text(json.dumps(values | {"eot_id": eot_id}))
        assert says in refused(folder)
    assert manifest["eot_id"] == END


def test_data_without_one_in_sight_are_noted(data: Path, flags: list[str], tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_split(tmp_path / split, np.arange(500) % 200)
    more = ["--train-dir", tmp_path / "train", "--valid-dir", tmp_path / "test", "--tokenizer", "bytes"]
    shown = succeed(
        run_here("run_pretrain.py", *flags, *more, "--train-steps", 1, "--checkpoints-dir", tmp_path / "run")
    )
    assert "are one document: none of them is the end-of-text id 256" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["", "--spmd", "--spmd --fsdp", "--attention sdpa", "--activation-checkpointing block"]
)
def test_xla_equals_torch(layout: str, trained: tuple[Path, str], flags: list[str], tmp_path: Path) -> None:
    devices = {"CPU_NUM_DEVICES": "8"} if "spmd" in layout else {}
    result = run_xla(*flags, *layout.split(), "--checkpoints-dir", tmp_path, **devices)
    succeed(result)
    same_as(trained[0], tmp_path)
    assert "warning: XLA" not in result.stderr
    assert [line["compiles"] for line in metrics(tmp_path) if "compiles" in line][-1] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["", "--fsdp", "--compile", "--attention chunked"])
def test_several_processes_equal_one(layout: str, trained: tuple[Path, str], flags: list[str], tmp_path: Path) -> None:
    succeed(torchrun(2, *flags, *layout.split(), "--checkpoints-dir", tmp_path))
    same_as(trained[0], tmp_path)


def same_as(folder: Path, other: Path) -> None:
    assert training_losses(other) == pytest.approx(training_losses(folder), rel=1e-5)
    losses = [[line["valid_loss"] for line in metrics(f) if "valid_loss" in line] for f in (folder, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
