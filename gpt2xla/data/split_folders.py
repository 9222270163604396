"""Finds the splits where the user names the folder that holds them, as `prepare_*` writes it: `my-data` is `my-data/train`
for --train-dir, and `my-data/test` for --valid-dir.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from gpt2xla.config import RunConfig
from gpt2xla.config.paths import is_url, split_weight
from gpt2xla.data.shard_files.shard_format import SUFFIXES
from gpt2xla.data.shards import MANIFEST
from gpt2xla.errors import user_error
from gpt2xla.storage import exists


def with_splits(config: RunConfig) -> RunConfig:
    """Return the run with the folders of its splits. Without --valid-dir it takes the test/ beside the train/ that it found,
    if there is one only."""
    data, given = config.data, config.given
    is_given = "valid_dir" in given
    train_dir, valid_dir, tests = data.train_dir, data.valid_dir, set()
    if not (config.general.do_test and is_given):  # it does not read --train-dir
        found = []
        for entry in data.train_dir:
            folder, weight = split_weight(entry)
            train = split_folder(folder, "train", "--train-dir")
            parent = train.rstrip("/").removesuffix("/train")
            if parent != train.rstrip("/") and (test := split_folder(parent, "test", "--train-dir")) != parent:
                tests.add(test)
            found.append(train if weight is None else f"{train}={entry.rpartition('=')[2]}")
        train_dir = tuple(found)
    if is_given:
        valid_dir = split_folder(valid_dir, "test", "--valid-dir")
    elif len(tests) == 1:
        valid_dir = tests.pop()
        # Who names the folder of both names its test/ too. Beside a train/, it is only a guess: a resumed run keeps its own.
        if "train_dir" in given and train_dir != data.train_dir:
            given = given | {"valid_dir"}
    data = dataclasses.replace(data, train_dir=train_dir, valid_dir=valid_dir)
    return dataclasses.replace(config, data=data, given=given)


def split_folder(folder: str, split: Literal["train", "test"], option: str) -> str:
    """Return the split's folder or URL in `folder`, if it is there and `folder` holds no shards itself; otherwise `folder`.
    Raises InputError if a folder cannot be looked into, or a URL cannot be opened."""
    below = f"{folder.rstrip('/')}/{split}"
    if is_url(folder):
        is_parent = not exists(f"{folder.rstrip('/')}/{MANIFEST}", option) and exists(f"{below}/{MANIFEST}", option)
    else:
        with user_error(f"{option} {folder}"):
            is_parent = bool(folder) and Path(below).is_dir() and not _holds_shards(Path(folder))
    return below if is_parent else folder


def _holds_shards(folder: Path) -> bool:
    return any(
        file.name == MANIFEST or (file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
        for file in folder.iterdir()
    )
