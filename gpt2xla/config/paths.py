"""Paths that a user names, and what shows without opening them that they are wrong: that is said before torch is imported.

Each check raises an InputError for `flag`. What it lets pass may still be wrong; whoever opens it says so.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt2xla import hub
from gpt2xla.errors import InputError, user_error
from gpt2xla.files import read_json

# How token shards are made, for messages: from a clone, or after pip install.
PREPARE = "scripts/prepare_text.py (or: gpt2xla prepare text)"
# A name that ends in these, or is a checkpoint's, is more likely a path than a hub id.
_CHECKPOINT = re.compile(r"step-\d{8,}|latest|best")
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".json")
# In the folder of a run with --keep-best: {"step", "valid_loss"} of its best checkpoint, which FOLDER@best means.
BEST_FILE = "best.json"
AT_BEST = "@best"


def is_url(name: str) -> bool:
    return "://" in name


def is_missing_path(name: str) -> bool:
    """Whether `name` is a path with nothing there: one that the hub could not know, or one into a folder that is here."""
    path = Path(name)
    if path.exists():
        return False
    if not hub.is_id(name):
        return True
    return (
        path.suffix in _FILE_SUFFIXES
        or _CHECKPOINT.fullmatch(path.name) is not None
        or (path.parent != Path() and path.parent.is_dir())
    )


def is_of_a_step(name: str) -> bool:
    """Whether the last part of a path or URL is a name that checkpoints have."""
    return re.fullmatch(r"step-\d{8,}", name.rstrip("/").rpartition("/")[2]) is not None


def step_folder(root: Path, step: int) -> Path:
    """Return where a run in `root` has the checkpoint of `step`."""
    return root / f"step-{step:08d}"


def read_best(root: Path) -> tuple[int, float] | None:
    """Return the step and the validation loss of the best checkpoint, by `root`'s best.json; None if there is no such file.
    Raises OSError, or ValueError if it holds something else."""
    try:
        return best_in(read_json(root / BEST_FILE))
    except FileNotFoundError:
        return None


def best_in(values: Any) -> tuple[int, float]:
    """Return the step and the validation loss that a best.json holds. Raises ValueError if it is none."""
    try:
        step, loss = values["step"], values["valid_loss"]
    except (KeyError, TypeError):
        raise ValueError("it has no step and valid_loss") from None
    if type(step) is not int or type(loss) is not float or not (step > 0 and math.isfinite(loss)):
        raise ValueError("its step or valid_loss is no such number")
    return step, loss


def best_checkpoint(name: str) -> Path | None:
    """Return the checkpoint that `name` means if it is FOLDER@best: the one that FOLDER's best.json names. Return None for
    other names, also for URLs and for that of a folder that is called so. Raises InputError if FOLDER has no such
    checkpoint."""
    root = Path(name.removesuffix(AT_BEST))
    if not name.endswith(AT_BEST) or is_url(name):
        return None
    with user_error(name):
        has_best = (root / BEST_FILE).exists()
        if Path(name).exists():
            if not has_best:
                return None
            raise InputError(
                f"{name} may mean that folder or the best checkpoint of {root}; write {name}/ or {root}/best"
            )
        if not root.is_dir() or name == AT_BEST:
            raise InputError(
                f"{name}: no such folder {name.removesuffix(AT_BEST)!r}; name that of a run with --keep-best"
            )
        try:
            best = read_best(root)
        except ValueError as error:
            raise InputError(f"{root / BEST_FILE} is damaged: {error}; name a checkpoint instead of {name}") from None
        if best is None:
            raise InputError(
                f"{name}: {root} has no {BEST_FILE}: --keep-best was not set, or there was no validation yet; {root} alone "
                "means its newest checkpoint"
            )
        folder = step_folder(root, best[0])
        if not folder.is_dir():
            raise InputError(
                f"{name}: {root / BEST_FILE} names {folder.name}, which is not there; name another checkpoint"
            )
        return folder


def check_shards(flag: str, folder: str) -> None:
    """Check a folder of token shards. A URL passes."""
    if not folder or is_url(folder):
        return
    path = Path(folder)
    with user_error(f"{flag} {folder}"):  # no permission, or a name that is too long
        if not path.is_dir():
            what = "is a file; name its folder" if path.exists() else "no such folder"
            raise InputError(f"{flag} {folder}: {what}; make one with {PREPARE}")


def check_all_shards(flag: str, folders: Sequence[str]) -> None:
    for folder in folders:
        check_shards(flag, folder)


def check_local(flag: str, name: str) -> None:
    """Check a place where files are kept. A URL would become a folder of that name."""
    if is_url(name):
        raise InputError(f"{flag} {name}: files are kept on this machine; name a folder, not a URL")


def check_file(flag: str, name: str) -> None:
    """Check that a file is there."""
    with user_error(f"{flag} {name}"):
        if name and not Path(name).exists():
            raise InputError(f"{flag} {name}: no such file; correct the path")


def check_mixture(flag: str, entries: Sequence[str]) -> None:
    """Check the folders of `a=0.7 b=0.3`, or a single folder."""
    if all(entries):
        for folder in parse_weights(flag, entries)[0]:
            check_shards(flag, folder)


def check_model(flag: str, name: str) -> None:
    """Check the name of a model. A URL passes, and so does one that may be on the hub."""
    with user_error(f"{flag} {name}"):
        if is_url(name) or _check_best(flag, name):
            return
        if name and is_missing_path(name):
            raise InputError(
                f"{flag} {name}: no such folder or file; correct the path, or give a model's id on the hub"
            )


def check_models(flag: str, names: Sequence[str]) -> None:
    for name in names:
        check_model(flag, name)


def check_tokenizer(flag: str, name: str) -> None:
    """Check the name of a tokenizer. A URL passes, and so does one that may be on the hub, or tiktoken's."""
    with user_error(f"{flag} {name}"):
        if name and not is_url(name) and is_missing_path(name):
            fix = "correct the path, or give bytes, one of tiktoken's names, or owner/name on the hub"
            raise InputError(f"{flag} {name}: no such folder or file; {fix}")


def check_hub_name(flag: str, name: str) -> None:
    """Check the name of a repository to push to."""
    if not hub.is_id(name):
        raise InputError(f"{flag} {name}: no name of a repository on the hub; write owner/name")


def check_resumed(flag: str, value: str) -> None:
    """Check the folder of the checkpoint to resume, unless `value` is auto, never or a URL."""
    if value in ("", "auto", "never") or is_url(value):
        return
    with user_error(f"{flag} {value}"):
        if not _check_best(flag, value) and not Path(value).is_dir():
            fix = "use auto, never or a path like checkpoints/step-00001000"
            raise InputError(f"{flag} {Path(value)}: no such checkpoint folder; {fix}")


def _check_best(flag: str, name: str) -> bool:
    """Whether `name` means the best checkpoint of a run. Raises InputError if there is none."""
    try:
        return best_checkpoint(name) is not None
    except InputError as error:
        raise InputError(f"{flag} {error}") from None


def parse_weights(flag: str, entries: Sequence[str]) -> tuple[list[str], list[float]]:
    """Return folders and weights from `a=0.7 b=0.3`, or from a single folder. Raises InputError."""
    folders: list[str] = []
    weights: list[float] = []
    for entry in entries:
        folder, weight = split_weight(entry)
        if weight is None:
            if len(entries) == 1:  # a folder may have = in its name
                return [entry], [1.0]
            raise InputError(f"{flag} {entry} has no weight: of several folders each needs one, such as {entry}=0.5")
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"{flag} {entry}: choose a weight above 0, or leave the folder out")
        folders.append(folder)
        weights.append(weight)
    seen: set[str] = set()
    for folder in folders:
        place = folder.rstrip("/") if is_url(folder) else os.path.realpath(folder)  # the same one may have two names
        if place in seen:
            raise InputError(f"{flag} names {folder} twice; name it once with the sum of its weights")
        seen.add(place)
    return folders, weights


def split_weight(entry: str) -> tuple[str, float | None]:
    """Return the folder and the weight of `a=0.7`; None for an entry without a weight."""
    folder, _, text = entry.rpartition("=")
    try:
        return (folder, float(text)) if folder else (entry, None)
    except ValueError:
        return entry, None
