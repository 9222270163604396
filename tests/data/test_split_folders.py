"""One folder that holds both splits, and the vocabulary that its manifests ask for."""

from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_RUN, prepare_documents, run_here, succeed, write_split

from gpt2xla.cli import parse_run
from gpt2xla.config import RunConfig, TorchConfig
from gpt2xla.data.opening import with_vocabulary
from gpt2xla.data.split_folders import with_splits
from gpt2xla.data.tokenizer import load_tokenizer


def config(*words: object) -> RunConfig:
    return parse_run(TorchConfig, list(map(str, words)))[0]


def folders(*words: object) -> tuple[tuple[str, ...], str]:
    data = with_splits(config(*words)).data
    return data.train_dir, data.valid_dir


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_documents(tmp_path_factory.mktemp("prepared") / "my-data")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_folder_of_splits_is_its_splits(prepared: Path, scheme: str) -> None:
    place = f"{scheme}{prepared}"
    train, test = f"{place}/train", f"{place}/test"
    assert folders("--train-dir", place) == ((train,), test)
    assert folders("--train-dir", f"{place}/", "--valid-dir", place) == ((train,), test)
    assert folders("--train-dir", place, "--valid-dir", test) == ((train,), test)
    assert folders("--train-dir", train, "--valid-dir", place) == ((train,), test)
    assert folders("--train-dir", train) == ((train,), test), "the one beside it"


def test_of_a_mixture_each_folder_is_its_split(prepared: Path, tmp_path: Path) -> None:
    write_split(tmp_path / "other" / "train", np.zeros(100))
    mixed = [f"{prepared}=0.7", f"{tmp_path}/other=3e-1"]
    train = (f"{prepared}/train=0.7", f"{tmp_path}/other/train=3e-1")
    assert folders("--train-dir", *mixed) == (train, f"{prepared}/test"), "the only one there is"
    write_split(tmp_path / "other" / "test", np.zeros(100))
    assert folders("--train-dir", *mixed) == (train, "./fineweb_10BT/test"), "either could be meant"


def test_a_folder_with_shards_of_its_own_stays(tmp_path: Path) -> None:
    write_split(tmp_path / "train", np.zeros(100))
    np.save(tmp_path / "0.npy", np.zeros(100, dtype=np.uint16))
    assert folders("--train-dir", tmp_path, "--valid-dir", tmp_path) == ((str(tmp_path),), str(tmp_path))


def test_the_vocabulary_is_that_of_the_data_rounded_up(prepared: Path, tmp_path: Path) -> None:
    def vocabulary(*words: object) -> tuple[int, str]:
        found, note = with_vocabulary(config(*words))
        return found.model.vocab_size, note

    padded = (384, "vocabulary: 384 ids, the data's 257 rounded up to a multiple of 128")
    assert vocabulary("--train-dir", prepared / "train") == padded
    assert vocabulary("--train-dir", f"file://{prepared}/train", "--data-cache", tmp_path / "cache") == padded
    assert vocabulary("--train-dir", f"{prepared}/train=1", f"{prepared}/test=1") == padded
    assert vocabulary("--train-dir", prepared / "train", "--vocab-size", 300) == (300, "")
    assert vocabulary("--preset", "gpt2", "--train-dir", prepared / "train") == (50257, "")
    write_split(tmp_path / "plain", np.zeros(100))
    size, note = vocabulary("--train-dir", tmp_path / "plain")
    assert size == 50304
    assert "the default" in note
    assert vocabulary("--train-dir", f"{prepared}/train=1", f"{tmp_path}/plain=1") == (size, note)
    load_tokenizer("bytes").save(tmp_path / "plain")
    assert vocabulary("--train-dir", tmp_path / "plain") == padded


def test_a_run_takes_and_saves_what_it_found(prepared: Path, tmp_path: Path) -> None:
    assert SMALL_RUN[0] == "--vocab-size"
    flags = [*SMALL_RUN[2:], "--checkpoints-dir", tmp_path]
    for resumed in (False, True):
        steps = 4 if resumed else 2
        text = succeed(run_here("run_pretrain.py", "--train-dir", prepared, *flags, "--train-steps", steps))
        assert ("vocabulary: 384 ids" in text) == (not resumed)
        assert "vocabulary 384, " in text
        assert ("changed: --train-steps 2 -> 4\n" in text) == resumed
    saved = config("--config", tmp_path / "run_config.json")
    assert saved.data.train_dir == (f"{prepared}/train",)
    assert saved.data.valid_dir == f"{prepared}/test"
    assert saved.model.vocab_size == 384
    tested = succeed(run_here("run_pretrain.py", "--do-test", "--valid-dir", prepared, "--model", tmp_path))
    assert "step-00000004: loss" in tested
