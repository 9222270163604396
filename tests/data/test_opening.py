"""Damaged, foreign and mixed data, through the program as a user runs it."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    SMALL_RUN,
    learnable_tokens,
    metrics,
    prepare_documents,
    run_here,
    succeed,
    training_losses,
    write_split,
)

from gpt2xla.checkpoint import seal
from gpt2xla.checkpoint.run_folder import RUN_CONFIG
from gpt2xla.data.shards import MANIFEST

# Options of conftest.SMALL_RUN, for ids up to 256.
BYTES_RUN = [*SMALL_RUN, "--vocab-size", "257", "--train-steps", "4", "--decay-steps", "20", "--no-shuffle"]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    return prepare_documents(tmp_path / "data")


def shard_of(data: Path) -> Path:
    return sorted((data / "train").glob("*.npy"))[1]


def truncate(data: Path) -> Path:
    file = shard_of(data)
    file.write_bytes(file.read_bytes()[:-100])
    return file


def flip_bit(data: Path) -> Path:
    file = shard_of(data)
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    return file


def widen(data: Path) -> Path:
    file = shard_of(data)
    np.save(file, np.load(file).astype(np.uint32))
    return file


def remove(data: Path) -> Path:
    file = shard_of(data)
    file.unlink()
    return file


def take_a_foreign_manifest(data: Path) -> Path:
    (data / "train" / MANIFEST).write_bytes((data / "test" / MANIFEST).read_bytes())
    return sorted((data / "train").glob("*.npy"))[0]


def write_another_manifest(data: Path) -> Path:
    (data / "train" / MANIFEST).write_text('{"name": "web application", "icons": []}')
    return data / "train" / MANIFEST


def exceed_the_vocabulary(data: Path) -> Path:
    file = shard_of(data)
    np.save(file, np.full(2000, 300, dtype=np.uint16))
    return file


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot be read as a shard"),
        (flip_bit, "sha256 differs"),
        (widen, "2000 uint32 tokens but manifest.json says 2000 uint16"),
        (remove, "is missing although manifest.json names it"),
        (take_a_foreign_manifest, "tokens but manifest.json says"),
        (write_another_manifest, "is not a manifest of token shards"),
        (exceed_the_vocabulary, "holds id 300"),
    ],
)
def test_damage_ends_the_run_before_it_begins(damage, message: str, prepared: Path, tmp_path: Path) -> None:
    file = damage(prepared)
    flags = ["--train-dir", prepared / "train", "--valid-dir", prepared / "test", "--checkpoints-dir", tmp_path / "out"]
    result = run_here("run_pretrain.py", *flags, *BYTES_RUN, *(["--verify-data"] if damage is flip_bit else []))
    assert result.returncode == 2, result.stdout + result.stderr
    assert str(file) in result.stderr
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_undamaged_data_verifies_and_trains(prepared: Path, tmp_path: Path) -> None:
    flags = ["--train-dir", prepared / "train", "--valid-dir", prepared / "test", "--checkpoints-dir", tmp_path / "out"]
    succeed(run_here("run_pretrain.py", *flags, *BYTES_RUN, "--verify-data"))
    assert len(training_losses(tmp_path / "out")) == 4


@pytest.fixture
def mixed(tmp_path: Path, data: Path) -> list[str]:
    write_split(tmp_path / "second", learnable_tokens(700, seed=5))
    return [f"{data / 'train'}=3", f"{tmp_path / 'second'}=1"]


def test_a_mixed_run_says_so_and_resumes_exactly(mixed: list[str], data: Path, tmp_path: Path) -> None:
    def train(folder: str, steps: int, *flags: object) -> str:
        always = ["--valid-dir", data / "test", "--checkpoints-dir", tmp_path / folder, "--shuffle"]
        return succeed(run_here("run_pretrain.py", *always, *SMALL_RUN, *flags, "--train-steps", steps))

    said = train("whole", 12, "--train-dir", *mixed)
    assert f"75.00% from {data / 'train'} (5,000 tokens) + 25.00% from {tmp_path / 'second'} (700 tokens)" in said
    # 12 updates of 3 x 4 sequences, over 312 and 43 windows of 16 tokens
    first, second = f"{144 * 0.75 / 312:.2f}", f"{144 * 0.25 / 43:.2f}"
    assert f"{first} epochs of {data / 'train'} and {second} epochs of {tmp_path / 'second'}" in said
    train("parts", 7, "--train-dir", *mixed)
    train("parts", 12)  # a continued run keeps its folders and weights
    assert training_losses(tmp_path / "parts") == training_losses(tmp_path / "whole")
    saved = json.loads((tmp_path / "whole" / "run_config.json").read_text())
    assert saved["train_dir"] == mixed


def test_a_continued_run_refuses_other_weights(mixed: list[str], data: Path, tmp_path: Path) -> None:
    always = ["--valid-dir", data / "test", "--checkpoints-dir", tmp_path / "out", *SMALL_RUN, "--train-dir"]
    succeed(run_here("run_pretrain.py", *always, *mixed, "--train-steps", 2))
    same_in_percent = [entry.replace("=3", "=75").replace("=1", "=25") for entry in mixed]
    succeed(run_here("run_pretrain.py", *always, *same_in_percent, "--train-steps", 3))
    for other in ([mixed[0], mixed[1].replace("=1", "=2")], [mixed[1], mixed[0]], [mixed[0]]):
        result = run_here("run_pretrain.py", *always, *other, "--train-steps", 4)
        assert result.returncode == 2
        assert "error: --train-dir is not what" in result.stderr, result.stderr
    assert metrics(tmp_path / "out")[-1]["step"] == 3


def test_data_of_two_tokenizers_is_not_mixed(prepared: Path, tmp_path: Path) -> None:
    file = tmp_path / "other" / MANIFEST
    file.parent.mkdir()
    for part in (prepared / "train").iterdir():
        (file.parent / part.name).write_bytes(part.read_bytes())
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer": "another", "tokenizer_sha256": "0" * 64}))
    result = run_here(
        "run_pretrain.py", "--train-dir", f"{prepared / 'train'}=1", f"{file.parent}=1", "--valid-dir", prepared / "test",
        "--checkpoints-dir", tmp_path / "out", *BYTES_RUN,
    )  # fmt: skip
    assert result.returncode == 2
    assert f"{file.parent} was made with another tokenizer (another)" in result.stderr


def test_folders_without_weights_are_refused(data: Path, tmp_path: Path) -> None:
    result = run_here(
        "run_pretrain.py", "--train-dir", data / "train", data / "test", "--checkpoints-dir", tmp_path / "out"
    )
    assert result.returncode == 2
    assert f"--train-dir {data / 'train'} has no weight" in result.stderr


def test_a_checkpoint_that_names_its_folder_as_text_goes_on(data_flags: list[str], tmp_path: Path) -> None:
    out = ["--checkpoints-dir", tmp_path / "out"]
    succeed(run_here("run_pretrain.py", *data_flags, *out, *SMALL_RUN, "--train-steps", 2))
    folder = tmp_path / "out" / "step-00000002"
    file = folder / RUN_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"train_dir": data_flags[1]}))
    seal.seal(folder, 2)
    assert "changed: --train-dir" not in succeed(run_here("run_pretrain.py", *out, *data_flags, "--train-steps", 3))
    succeed(run_here("run_pretrain.py", *out, "--train-steps", 4))
