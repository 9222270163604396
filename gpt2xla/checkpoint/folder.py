"""The folder of a checkpoint, written so that a crash leaves the old ones intact.

`step-00001000/` is a Hugging Face model folder. Beside the weights it has `training_state.pt`, `run_config.json`, and the
folder `training_state/` if the optimizer's state was split over devices (`sharded_state.py`). It is written under a
temporary name and then renamed. Its file `COMPLETE`, with size and hash of every other file, shows that it is whole
(`seal.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from gpt2xla.checkpoint.best import Best
from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.checkpoint.model_card import MODEL_CARD, card_of_run
from gpt2xla.checkpoint.run_folder import RUN_CONFIG, set_aside, step_folder
from gpt2xla.checkpoint.seal import seal
from gpt2xla.config import RunConfig
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import InputError
from gpt2xla.files import write_whole
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.logs.console import say

TRAINING_STATE = "training_state.pt"
SHARDS = "training_state"
# Made when the evaluations after the checkpoint's step, which a stop had cut off, are done: it holds the best validation as
# it is since then (`best.py`). `COMPLETE` does not list it.
EVALUATED = "EVALUATED"


def save(
    root: Path,
    *,
    config: RunConfig,
    weights: dict[str, Tensor],
    training: dict[str, Any],
    tokenizer: Tokenizer | None,
    settings: GenerationSettings,
    devices: str,
    shards: Path,
) -> Path:
    """Write `step-XXXXXXXX` under `root` for `training["step"]`; return it once it is safely on disk.

    A folder of the same step that someone put there meanwhile is set aside.

    Args:
        weights: by our parameter names, on the CPU.
        devices: which they were trained on, in words.
        shards: the folder with the part of the training state that `sharded_state` wrote. If it exists, it is moved in.

    Raises OSError if the checkpoint could not be written. Nothing is left of it then."""
    final = step_folder(root, training["step"])
    partial = root / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(partial, config, weights, training, tokenizer, settings, devices, shards)
        if final.exists():
            say(set_aside(final))
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
    devices: str,
    shards: Path,
) -> None:
    hf.save_model(folder, config.model, weights, settings)
    if tokenizer:
        hf.save_tokenizer(folder, tokenizer, config.model.seq_length)
    with (folder / TRAINING_STATE).open("wb") as state:  # given a path, torch would hide the error of the disk
        torch.save(training, state)
    if shards.is_dir():
        shards.rename(folder / SHARDS)
    write_run_config(folder, config)
    card = card_of_run(config, weights, training, tokenizer, folder.parent, devices)
    (folder / MODEL_CARD).write_text(card, encoding="utf-8")
    seal(folder, training["step"])
    for file in [*folder.rglob("*"), folder]:
        _fsync(file)


def mark_evaluated(folder: Path, best: dict[str, Any]) -> None:
    """Note in a checkpoint that the evaluations due after its step are done, and the best validation with them. Nothing else
    in it changes. Raises OSError."""
    write_whole(folder / EVALUATED, json.dumps(best) + "\n")
    _fsync(folder)


def is_evaluated(folder: Path, training: dict[str, Any]) -> bool:
    """Whether the evaluations due after the checkpoint's step are done. They are not if the run was stopped during them."""
    return training.get("is_evaluated", True) or (folder / EVALUATED).exists()


def stored_best(folder: Path, training: dict[str, Any]) -> Best:
    """Return the best validation after the checkpoint's step. Checkpoints of older versions do not say: it is that of a run
    that has not validated yet. Raises InputError if it is damaged."""
    mark, state = folder / EVALUATED, training.get("best", Best().state())
    is_marked = not training.get("is_evaluated", True) and mark.exists()
    try:
        if is_marked and (text := mark.read_text(encoding="utf-8")):
            state = json.loads(text)
        return Best.load(state, training["step"])
    except (OSError, ValueError, TypeError, AttributeError):
        file, fix = (mark, "delete that file") if is_marked else (folder / TRAINING_STATE, "choose another checkpoint")
        raise InputError(f"{file} does not hold the best validation of a run; {fix}") from None


def write_run_config(folder: Path, config: RunConfig) -> None:
    """Write all options of the run. `--config run_config.json` reads them back."""
    write_whole(folder / RUN_CONFIG, json.dumps(config.to_flat(), indent=2) + "\n")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network and FUSE file systems refuse to sync a folder; a file's refusal is an error.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
