"""Folders written by `Dataset.save_to_disk` and `DatasetDict.save_to_disk`: which of their files are data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt2xla.errors import InputError
from gpt2xla.files import read_json

STATE = "state.json"
INFO = "dataset_info.json"
SPLITS = "dataset_dict.json"


def is_one(folder: Path) -> bool:
    return (folder / STATE).is_file() and (folder / INFO).is_file()


def data_files(folder: Path, option: str) -> list[Path]:
    """Return the files that state.json names, in its order; others are left over from an earlier save.

    Raises InputError if it is damaged, a file is missing, or an old version saved a separate order of the rows.
    """
    state = _read(folder / STATE, option)
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
        if any(Path(name).name != name for name in names):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{option} {folder / STATE} names no data files; save the dataset again") from None
    if any(value for key, value in state.items() if key.startswith("_indices")):
        fix = "load it with an old version of datasets, and save flatten_indices() of it"
        raise InputError(f"{option} {folder} holds rows in the order of a separate list of indices; {fix}")
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{option} {folder} lacks {name}, although {STATE} names it; copy it again")
    return [folder / name for name in names]


def splits(folder: Path, option: str) -> list[str]:
    """Return the names of the splits in a folder of several. Raises InputError if its list is damaged."""
    names = _read(folder / SPLITS, option).get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{option} {folder / SPLITS} names no splits; save the dataset again")
    return names


def split_folder(folder: Path, split: str, option: str) -> Path:
    """Return the folder of one split. Raises InputError if there is none of that name."""
    if split not in (names := splits(folder, option)):
        raise InputError(f"{option} {folder} has no split {split!r} but {', '.join(names)}; name the folder of one")
    if not is_one(folder / split):
        raise InputError(f"{option} {folder} lacks {split}/ or a part of it, although {SPLITS} names it; copy it again")
    return folder / split


def _read(file: Path, option: str) -> dict[str, Any]:
    try:
        values = read_json(file)
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{option} {file} cannot be read as the JSON that datasets writes; save the dataset again")
    return values
