"""Pushes a model to a repository on the Hugging Face hub, with its card and the picture of its run's losses."""

from __future__ import annotations

from pathlib import Path

from gpt2xla import hub
from gpt2xla.checkpoint.folder import SHARDS, TRAINING_STATE
from gpt2xla.checkpoint.model_card import MODEL_CARD, published
from gpt2xla.checkpoint.run_folder import RUN_CONFIG
from gpt2xla.checkpoint.seal import COMPLETE, find_damage, resealed
from gpt2xla.errors import InputError, RunFailed
from gpt2xla.logs.run_curves import read_curves

# What belongs to a model. run_config.json, which names folders of this machine, goes with the training state only.
_MODEL_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")
_PICTURE = "loss.png"


def push(source: Path, name: str, flag: str, *, branch: str | None = None, with_training_state: bool = False) -> str:
    """Push the model in the folder `source` to the hub's repository `name`, and return its address there.

    A repository that is not there is made, and is private. A card that is there keeps its front matter, such as its licence.

    Args:
        flag: the option that gave the name, for messages.
        branch: of the repository; None is its main one.
        with_training_state: push all of a checkpoint, so that a copy can be resumed.

    Raises:
        InputError: `source` is no such folder, or the repository cannot be written to.
        RunFailed: the upload failed."""
    files, picture = _files(source, with_training_state), _picture(source.parent)
    name = hub.repository(name, flag)
    try:
        if (source / MODEL_CARD).is_file():
            loss = (
                picture if isinstance(picture, str) else f"![Training and validation loss against tokens]({_PICTURE})"
            )
            text, front = (source / MODEL_CARD).read_text(encoding="utf-8"), hub.text_of(name, MODEL_CARD, branch)
            card = published(text, source.name, name, branch, loss, front, with_training_state).encode()
            files[MODEL_CARD] = card
            if with_training_state:
                files[COMPLETE] = resealed(source, MODEL_CARD, card).encode()
            if isinstance(picture, bytes):
                files[_PICTURE] = picture
        return hub.push(name, files, f"Push {source.name}", branch)
    except Exception as error:  # the client lets errors of several HTTP libraries through
        raise not_pushed(source, name, hub.why_not_pushed(error)) from None


def not_pushed(source: Path, name: str, why: str) -> RunFailed:
    """Return the error that says what did not happen, why, and how to make up for it."""
    command = f"python scripts/push_to_hub.py --model {source} --name {name}"
    return RunFailed(f"{source} is whole, but was not pushed to {name}: {why}; then push it with {command}")


def _files(source: Path, with_training_state: bool) -> dict[str, Path | bytes]:
    """Return the files to push by their names in the repository, without the card."""
    if not source.is_dir() or not any(source.glob("*.safetensors")):
        raise InputError(
            f"--model {source}: no folder with a model.safetensors; make one with scripts/convert_checkpoint.py"
        )
    if not with_training_state:
        found = sorted(file for file in source.iterdir() if file.suffix in _MODEL_FILES and file.is_file())
        return {file.name: file for file in found if file.name != RUN_CONFIG}
    if damage := find_damage(source):
        raise InputError(f"--training-state: {damage}; choose another checkpoint, or leave the flag out")
    within = [source, source / SHARDS]
    found = sorted(file for folder in within if folder.is_dir() for file in folder.iterdir() if file.is_file())
    assert source / TRAINING_STATE in found
    return {file.relative_to(source).as_posix(): file for file in found}


def _picture(run: Path) -> bytes | str:
    """Return the picture of the losses of the run in a folder, or the sentence that says why there is none."""
    try:
        curves = read_curves(run)
    except InputError:
        return "There is no picture: the log of the run was not beside the model."
    try:
        from gpt2xla.logs.loss_picture import draw
    except ModuleNotFoundError:
        return "There is no picture: matplotlib was not installed where the model was pushed."
    return draw([curves], "png")
