"""Which files of a folder are the shards of a split."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import prepare_documents
from data.shard_writers import IDS, put, raw

from gpt2xla.data.shards import TokenStream
from gpt2xla.errors import InputError


@pytest.mark.parametrize(
    ("names", "train", "valid"),
    [
        (["train.bin", "val.bin"], ["train.bin"], ["val.bin"]),
        (["train.bin", "test.bin"], ["train.bin"], ["test.bin"]),
        (["train.bin", "test.bin", "validation.bin"], ["train.bin"], ["validation.bin"]),
        (["w_train_1.bin", "w_train_2.bin", "w_val_1.bin"], ["w_train_1.bin", "w_train_2.bin"], ["w_val_1.bin"]),
        (["test_run_train.bin", "test_run_val.bin"], ["test_run_train.bin"], ["test_run_val.bin"]),
        (["train_val.bin", "train_train.bin"], ["train_train.bin"], ["train_val.bin"]),
        (["pretrain_1.bin", "interval_2.bin"], None, None),
        (["constraint.bin", "x.bin"], None, None),
        (["train_1.bin", "x.bin"], None, None),
        (["training_val_1.bin", "training_val_2.bin"], None, None),
    ],
)
def test_a_folder_of_several_splits(names: list[str], train: list[str], valid: list[str], tmp_path: Path) -> None:
    put(tmp_path, {name: raw(IDS[number:]) for number, name in enumerate(names)})
    for option, expected in (("--train-dir", train), ("--valid-dir", valid)):
        stream = TokenStream(tmp_path, option)
        assert [file.name for file in stream.files] == (expected or sorted(names))
        assert len(stream.notes) == (expected is not None)


def test_a_split_of_the_other_name_is_noted(tmp_path: Path) -> None:
    stream = TokenStream(put(tmp_path, {"train.bin": raw(IDS)}), "--valid-dir")
    assert "reads shards named train" in stream.notes[0]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, {"a.bin": raw(IDS), "._a.bin": b"Mac OS X", ".b.npy": b""})
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "x.bin").mkdir()
    assert TokenStream(tmp_path).length == len(IDS)


def test_links_are_files_and_read_once(tmp_path: Path) -> None:
    put(tmp_path, {"blob": raw(IDS)})
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "a.bin").symlink_to("../blob")
    assert TokenStream(folder).length == len(IDS)
    os.link(tmp_path / "blob", folder / "b.bin")
    with pytest.raises(InputError, match=r"a\.bin and b\.bin are links to one file"):
        TokenStream(folder)
    (folder / "b.bin").unlink()
    (tmp_path / "blob").unlink()
    with pytest.raises(InputError, match=r"a\.bin links to a file that is not there"):
        TokenStream(folder)


def test_shards_that_a_manifest_does_not_name_are_refused(tmp_path: Path) -> None:
    train = prepare_documents(tmp_path / "data") / "train"
    np.save(train / "shard_999999.npy", IDS)
    with pytest.raises(InputError, match=r"shard_999999\.npy is not named in manifest\.json"):
        TokenStream(train)
