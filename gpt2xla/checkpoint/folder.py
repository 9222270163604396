"""Checkpoint folders, written so that a crash leaves the old ones intact, and verified before use.

`step-00001000/` is a Hugging Face model folder. Beside the weights it has `training_state.pt`, `run_config.json`, and the
folder `training_state/` if the optimizer's state was split over devices (`sharded_state.py`). It is written under a
temporary name and then renamed. Its file `COMPLETE`, with size and hash of every other file, shows that it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.config import RunConfig
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.files import file_sha256, read_json, write_whole
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.logs.sinks import METRICS_FILE

COMPLETE = "COMPLETE"
TRAINING_STATE = "training_state.pt"
SHARDS = "training_state"
RUN_CONFIG = "run_config.json"


def save(
    root: Path,
    *,
    config: RunConfig,
    weights: dict[str, Tensor],
    training: dict[str, Any],
    tokenizer: Tokenizer | None,
    settings: GenerationSettings,
    shards: Path,
) -> Path:
    """Write `step-XXXXXXXX` under `root` for `training["step"]`; return it once it is safely on disk.

    An older folder of the same step is set aside.

    Args:
        weights: by our parameter names, on the CPU.
        shards: the folder with the part of the training state that `sharded_state` wrote. If it exists, it is moved in.

    Raises OSError if the checkpoint could not be written. Nothing is left of it then."""
    final = step_folder(root, training["step"])
    partial = root / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(partial, config, weights, training, tokenizer, settings, shards)
        if final.exists():
            _set_aside(final)
        os.rename(partial, final)
    # On a full disk, torch and safetensors raise their own errors.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(shards, ignore_errors=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{final} could not be saved: {cause}") from None
    _fsync(root)
    return final


def _write(
    folder: Path,
    config: RunConfig,
    weights: dict[str, Tensor],
    training: dict[str, Any],
    tokenizer: Tokenizer | None,
    settings: GenerationSettings,
    shards: Path,
) -> None:
    hf.save_model(folder, config.model, weights, settings)
    if tokenizer:
        tokenizer.save(folder)
    with (folder / TRAINING_STATE).open("wb") as state:  # given a path, torch would hide the error of the disk
        torch.save(training, state)
    if shards.is_dir():
        shards.rename(folder / SHARDS)
    write_run_config(folder, config)
    seal(folder, training["step"])
    for file in [*folder.rglob("*"), folder]:
        _fsync(file)


def seal(folder: Path, step: int) -> None:
    """Write COMPLETE: the step, the size and hash of every file, and a hash of these entries."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / COMPLETE
    }
    contents = {"step": step, "files": files}
    sealed = contents | {"sha256": _sha256(contents)}
    (folder / COMPLETE).write_text(json.dumps(sealed, indent=2) + "\n", encoding="utf-8")


def _sha256(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def step_folder(root: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies."""
    return root / f"step-{step:08d}"


def shards_folder(root: Path, step: int) -> Path:
    """Return where to write what `save` takes as `shards`. An interrupted one is removed like any partial folder."""
    return root / f".step-{step:08d}.{SHARDS}.partial"


def prepare_folder(root: Path, step: int) -> list[str]:
    """Make `root` ready for a run that continues after `step`, and return lines for the user.

    Leftovers of interrupted writes are removed. Checkpoints of later steps are set aside, with a copy of the metrics, so
    that no later start takes them for this run's."""
    for partial in root.glob(".step-*.partial"):
        shutil.rmtree(partial)
    for name in (RUN_CONFIG, METRICS_FILE):
        for partial in root.glob(f".{name}.*.partial"):
            partial.unlink()
    later = sorted(folder for folder in root.glob("step-*") if folder > step_folder(root, step))
    if later and (root / METRICS_FILE).exists():
        shutil.copy(root / METRICS_FILE, _abandoned_name(root / METRICS_FILE))
    return [f"set aside: {folder.name} is now {_set_aside(folder).name}" for folder in later]


def prune(root: Path, newest: Path, limit: int) -> None:
    """Delete the oldest checkpoints so that `limit` remain (0: keep all). If `newest` is damaged, this deletes nothing and
    raises OSError."""
    old = [folder for folder in list_checkpoints(root) if folder < newest]
    surplus = old[: max(0, len(old) + 1 - limit)] if limit else []
    if surplus and not (problem := find_damage(newest)):
        for folder in surplus:
            # Renamed first: a half-deleted one is never loaded, and the next start removes the rest.
            shutil.rmtree(folder.rename(root / f".{folder.name}.partial"))
    elif surplus:
        raise OSError(f"the checkpoint just written is damaged, so no older one was deleted: {problem}")


def list_checkpoints(root: Path) -> list[Path]:
    """Return the finished checkpoints in `root`, oldest first."""
    return [folder for folder in list_folders(root) if (folder / COMPLETE).is_file()]


def list_folders(root: Path) -> list[Path]:
    """Return the folders in `root` that are named like checkpoints, finished or not, oldest first."""
    return sorted(folder for folder in root.glob("step-*") if folder.is_dir())


def step_of(folder: Path) -> int:
    """Return the step at which a checkpoint was saved; 0 for any other model folder."""
    try:
        return int(read_json(folder / COMPLETE)["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, by the sizes and hashes in COMPLETE; None if it is whole."""
    try:
        contents = read_json(folder / COMPLETE)
        if contents.pop("sha256") != _sha256(contents):
            return f"{folder / COMPLETE} is damaged"
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in contents["files"].items()}
    except FileNotFoundError:
        return f"{folder} is not a finished checkpoint: it has no file {COMPLETE}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / COMPLETE} is damaged"
    for name, (size, sha256) in expected.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{folder / COMPLETE} names a file outside of its folder"
        try:
            is_there = file.is_file()
        except OSError:
            return f"{folder / COMPLETE} names a file that cannot exist"
        if not is_there:
            return f"{file} is missing"
        if file.stat().st_size != size or file_sha256(file) != sha256:
            return f"{file} is damaged: its contents have changed since it was saved"
    return None


def write_run_config(folder: Path, config: RunConfig) -> None:
    """Write all options of the run. `--config run_config.json` reads them back."""
    write_whole(folder / RUN_CONFIG, json.dumps(config.to_flat(), indent=2) + "\n")


def _set_aside(folder: Path) -> Path:
    return folder.rename(_abandoned_name(folder))


def _abandoned_name(path: Path) -> Path:
    number = 1
    while (name := path.with_name(f"abandoned-{number}-{path.name}")).exists():
        number += 1
    return name


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network and FUSE file systems refuse to sync a folder; a file's refusal is an error.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
