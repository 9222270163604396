"""Checkpoint folders: written so that a crash leaves the old ones good, verified before they are used.

`step-00001000/` is a Hugging Face model folder with `training_state.pt` and `run_config.json` beside the weights. It is
written under a temporary name and renamed; `COMPLETE`, with size and hash of every file, says that it is whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2xla import hf
from gpt2xla.config import GeneralConfig, ModelConfig, RunConfig, flag
from gpt2xla.data.shards import file_sha256
from gpt2xla.errors import InputError
from gpt2xla.model import GPT2
from gpt2xla.pt_file import load_pt_model
from gpt2xla.tokenizer import Tokenizer

COMPLETE = "COMPLETE"
TRAINING_STATE = "training_state.pt"
RUN_CONFIG = "run_config.json"


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        source: the checkpoint folder or file, None for new weights.
        model: the model's shape, as the checkpoint and the flags agree on it.
        weights: by our parameter names, on the CPU; None for new weights.
        training: what `save` stored of the run to be continued; None when a new run begins at step 0.
        skipped: what is wrong with newer checkpoints that were passed over, a line each.
    """

    source: Path | None
    model: ModelConfig
    weights: dict[str, Tensor] | None = None
    training: dict[str, Any] | None = None
    skipped: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return self.training["step"] if self.training else 0


def find_start(config: RunConfig) -> Start:
    """Decide by --resume and --from-checkpoint where the run begins, and load it.

    Raises:
        InputError: what was asked for is missing, damaged, or contradicts the flags.
    """
    general = config.general
    skipped: list[str] = []
    source, continues = None, False
    if general.resume not in ("auto", "never"):
        source, continues = Path(general.resume), True
        _verify_or_refuse(source)
    elif general.resume == "auto" and not (general.do_test and general.from_checkpoint):
        source, skipped = _newest_good(Path(general.checkpoints_dir))
        continues = source is not None
    elif general.resume == "never" and not general.do_test:
        _refuse_to_mix(general)
    if source is None and general.from_checkpoint is not None:
        source, continues = _named_source(general)
    if source is None:
        config.model.check()
        return Start(None, config.model, skipped=tuple(skipped))
    saved_model, weights = load_weights(source)
    training = _load_training_state(source) if continues else None
    return Start(source, _agree(config, saved_model, source), weights, training, tuple(skipped))


def locate(name: str) -> Path:
    """The folder or file that a user's `name` means: a path, a folder of checkpoints (its newest), an OpenAI size or a
    hub id. Raises InputError if it means nothing.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir() and not (path / "config.json").exists() and (checkpoints := list_checkpoints(path)):
        return checkpoints[-1]
    return hf.find_folder(name)


def load_weights(source: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Model configuration and weights, on the CPU and in our names, of a folder or `.pt` file. Raises InputError."""
    return load_pt_model(source) if source.is_file() else hf.load_model(source)


def build_model(config: ModelConfig, weights: dict[str, Tensor], source: Path) -> GPT2:
    """Raises InputError if the weights of `source` are not those of such a model."""
    model = GPT2(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source} does not hold the model that its configuration describes: {reason}") from None
    return model


def save(
    root: Path,
    *,
    config: RunConfig,
    weights: dict[str, Tensor],
    training: dict[str, Any],
    tokenizer: Tokenizer | None,
) -> Path:
    """Write `step-XXXXXXXX` under `root` for `training["step"]`; return it once it is safely on disk.

    `weights` are by our names and on the CPU. An older folder of the same step is replaced.
    """
    final = root / f"step-{training['step']:08d}"
    partial = root / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    hf.save_model(partial, config.model, weights, tokenizer.eot_id if tokenizer else None)
    if tokenizer:
        tokenizer.save(partial)
    torch.save(training, partial / TRAINING_STATE)
    write_run_config(partial, config)
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in sorted(partial.iterdir())
    }
    (partial / COMPLETE).write_text(json.dumps({"step": training["step"], "files": files}, indent=2) + "\n")
    for file in [*partial.iterdir(), partial]:
        _fsync(file)
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    _fsync(root)
    return final


def prune(root: Path, newest: Path, limit: int) -> None:
    """Delete the oldest checkpoints so that `limit` remain (0: all stay), if `newest` reads back whole."""
    old = [folder for folder in list_checkpoints(root) if folder < newest]
    surplus = old[: max(0, len(old) + 1 - limit)] if limit else []
    if surplus and not (problem := find_damage(newest)):
        for folder in surplus:
            (folder / COMPLETE).unlink(missing_ok=True)  # so that a half-deleted one is never taken
            shutil.rmtree(folder)
    elif surplus:
        raise OSError(f"the checkpoint just written is damaged, so no older one was deleted: {problem}")


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoint folders below `root`, oldest first."""
    return sorted(folder for folder in root.glob("step-*") if (folder / COMPLETE).is_file())


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by the sizes and hashes in COMPLETE; None if nothing is."""
    try:
        files = json.loads((folder / COMPLETE).read_text())["files"]
        expected = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{folder} is not a finished checkpoint: it has no file {COMPLETE}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / COMPLETE} is damaged"
    for name, (size, sha256) in expected.items():
        file = folder / name
        if Path(name).name != name:
            return f"{folder / COMPLETE} names a file outside of its folder"
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size or file_sha256(file) != sha256:
            return f"{file} is damaged: its contents are not what was saved"
    return None


def write_run_config(folder: Path, config: RunConfig) -> None:
    """All options of the run; `--config run_config.json` reads them back."""
    (folder / RUN_CONFIG).write_text(json.dumps(config.to_flat(), indent=2) + "\n", encoding="utf-8")


def _newest_good(root: Path) -> tuple[Path | None, list[str]]:
    skipped: list[str] = []
    for folder in reversed(list_checkpoints(root)):
        damage = find_damage(folder)
        if damage is None:
            return folder, skipped
        skipped.append(damage)
    if skipped:
        raise InputError(f"no checkpoint in {root} is whole ({skipped[0]}); move them away to start anew")
    return None, skipped


def _verify_or_refuse(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(
            f"--resume {folder}: no such checkpoint folder; use auto, never or a path like checkpoints/step-00001000"
        )
    if damage := find_damage(folder):
        raise InputError(f"--resume {folder}: {damage}; choose another checkpoint, or auto for the newest whole one")


def _refuse_to_mix(general: GeneralConfig) -> None:
    if existing := list_checkpoints(Path(general.checkpoints_dir)):
        raise InputError(
            f"--resume never: --checkpoints-dir {general.checkpoints_dir} already holds {existing[-1].name} of another run; "
            "choose another folder or move it away"
        )


def _named_source(general: GeneralConfig) -> tuple[Path, bool]:
    """The source that --from-checkpoint names, and whether to continue its run."""
    folder = locate(str(general.from_checkpoint))
    if not (folder / TRAINING_STATE).exists():
        return folder, False
    if damage := find_damage(folder):
        raise InputError(f"--from-checkpoint {folder}: {damage}; choose another checkpoint")
    return folder, general.resume != "never"


def _load_training_state(folder: Path) -> dict[str, Any]:
    try:
        return torch.load(folder / TRAINING_STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{folder / TRAINING_STATE} cannot be read: {str(error).splitlines()[0]}") from None


def _agree(config: RunConfig, saved: ModelConfig, source: Path) -> ModelConfig:
    """The checkpoint's model; options the user gave must say the same, but for dropout, which is free to change."""
    for field in dataclasses.fields(ModelConfig):
        asked, found = getattr(config.model, field.name), getattr(saved, field.name)
        if field.name in config.given and field.name != "dropout" and asked != found:
            raise InputError(
                f"{flag(field.name)} {asked} contradicts {source}, where it is {found}; leave the flag out or use {found}"
            )
    return dataclasses.replace(saved, dropout=config.model.dropout) if "dropout" in config.given else saved


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
