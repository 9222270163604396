"""The folder of a run: its checkpoints by name, the link to the newest, and what is set aside or deleted. Knows no torch.

`step-00001000/` is a checkpoint, `latest` a link to the newest one, and `abandoned-1-step-00002000/` one that a run left
behind when it went back to an earlier step. `best.py` writes what names the best one. Names that begin with a dot are
unfinished."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

from gpt2xla.checkpoint.logged import newest_line
from gpt2xla.checkpoint.seal import COMPLETE, find_damage
from gpt2xla.config.paths import BEST_FILE, read_best
from gpt2xla.config.paths import step_folder as step_folder
from gpt2xla.errors import InputError
from gpt2xla.files import read_json, read_json_object
from gpt2xla.logs.sinks import METRICS_FILE

T = TypeVar("T")

LATEST = "latest"
RUN_CONFIG = "run_config.json"
_SHARDS = "training_state"
_STEP = re.compile(r"step-\d{8,}")  # a copy under another name, such as step-best, is the user's
_ABANDONED = re.compile(r"abandoned-(\d+)-(.*)")


def stays_in_documents(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was trained with --document-mask. Models from elsewhere were not."""
    options = read_json_object(checkpoint / RUN_CONFIG) if (checkpoint / COMPLETE).is_file() else None
    return bool(options and options.get("document_mask"))


def shards_folder(root: Path, step: int) -> Path:
    """Return where to write what `folder.save` takes as `shards`. An interrupted one is removed like any partial folder."""
    return root / f".step-{step:08d}.{_SHARDS}.partial"


def list_checkpoints(root: Path) -> list[Path]:
    """Return the finished checkpoints in `root`, oldest first."""
    return [folder for folder in list_folders(root) if is_finished(folder)]


def is_finished(folder: Path) -> bool:
    """Whether `folder` is a checkpoint that was written to its end."""
    return (folder / COMPLETE).is_file()


def list_folders(root: Path) -> list[Path]:
    """Return the folders in `root` that are named like checkpoints, finished or not, oldest first."""
    return sorted(folder for folder in root.glob("step-*") if _STEP.fullmatch(folder.name) and folder.is_dir())


def list_abandoned(root: Path) -> list[Path]:
    """Return the checkpoints in `root` that were set aside, oldest first."""
    found = [(_ABANDONED.match(folder.name), folder) for folder in root.glob("abandoned-*-step-*") if folder.is_dir()]
    steps = ((int(name[1]), name[2], folder) for name, folder in found if name and _STEP.fullmatch(name[2]))
    return [folder for _, _, folder in sorted(steps)]


def newest_in_words(root: Path) -> str:
    """Return which finished checkpoint in `root` is the newest, for a message."""
    found = list_checkpoints(root)
    return f"newest checkpoint: step {int(found[-1].name[5:])} ({found[-1]})" if found else "there is no checkpoint"


def best_of(root: Path) -> tuple[int, float] | None:
    """Return step and validation loss of the checkpoint that best.json names; None if it names none, or is damaged."""
    with contextlib.suppress(ValueError):
        return read_best(root)
    return None


def followed(path: Path) -> Path:
    """Return the checkpoint that a link such as `latest` means, or `path` itself if it is no link to its neighbour."""
    if path.is_symlink() and os.sep not in (target := os.readlink(path)):
        return path.with_name(target)
    return path


def point(link: Path, folder: Path) -> str | None:
    """Make `link` a symbolic link to its neighbour `folder`. Readers find the old one or the new one, also after a crash.

    Return a line for the user if that is impossible, as on a file system without links."""
    partial = link.with_name(f".{link.name}.{os.getpid()}.partial")
    if link.exists() and not (link.is_symlink() or _is_from_bucket(link)):
        return f"{link} is no link, and stays as it is; it would mean {folder.name}"
    try:
        partial.unlink(missing_ok=True)
        partial.symlink_to(folder.name)
        os.replace(partial, link)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        return f"no link {link} ({error.strerror}); give the folder itself, such as {folder}"
    return None


def _is_from_bucket(link: Path) -> bool:
    """Whether `link` is the object `latest` of a bucket that was copied to here: the name of a checkpoint as text."""
    with contextlib.suppress(OSError, ValueError):
        return link.stat().st_size < 100 and _STEP.fullmatch(link.read_text(encoding="utf-8").strip()) is not None
    return False


def prepare_folder(root: Path, step: int) -> list[str]:
    """Make `root` ready for a run that continues after `step`, and return lines for the user.

    Leftovers of interrupted writes are removed, and `latest` is put right. Checkpoints of later steps are set aside, with a
    copy of the metrics, so that no later start takes them for this run's."""
    for partial in (*root.glob(".step-*.partial"), *root.glob(".abandoned-*.partial")):
        shutil.rmtree(partial)
    names = (f".{name}.*.partial" for name in (RUN_CONFIG, METRICS_FILE, LATEST, BEST_FILE, "best"))
    for pattern in (*names, "step-*/.*.partial", "sketches/.*.partial"):
        for partial in root.glob(pattern):
            partial.unlink(missing_ok=True)
    later = [folder for folder in list_folders(root) if folder > step_folder(root, step)]
    repair_latest(root, step)
    prefix = _next_prefix(root)
    if later and (root / METRICS_FILE).exists():
        shutil.copy(root / METRICS_FILE, root / f"{prefix}-{METRICS_FILE}")
    return [set_aside(folder, prefix) for folder in later]


def repair_latest(root: Path, step: int) -> None:
    """Point `latest` to the newest checkpoint up to `step`. A crash may have left it at an older one, or a user may have
    moved its target."""
    if kept := [folder for folder in list_checkpoints(root) if folder <= step_folder(root, step)]:
        point(root / LATEST, kept[-1])
    elif (root / LATEST).is_symlink():
        (root / LATEST).unlink()


def set_aside(folder: Path, prefix: str | None = None) -> str:
    """Rename a checkpoint so that no run takes it for its own, and return a line for the user."""
    name = f"{prefix or _next_prefix(folder.parent)}-{folder.name}"
    folder.rename(folder.with_name(name))
    return f"set aside: {folder.name} is now {name}"


def _next_prefix(root: Path) -> str:
    taken = [int(name[1]) for path in root.glob("abandoned-*") if (name := _ABANDONED.match(path.name))]
    return f"abandoned-{max(taken, default=0) + 1}"


def prune(root: Path, newest: Path, limit: int, in_use: Collection[Path] = ()) -> list[str]:
    """Delete the oldest checkpoints so that `limit` remain (0: keep all), except those `in_use`. Return a line for the user
    about each that was set aside and is deleted now. If `newest` is damaged, this deletes nothing and raises OSError."""
    abandoned, best = list_abandoned(root), best_of(root)
    kept = step_folder(root, best[0]) if best else None
    older = [folder for folder in list_checkpoints(root) if folder < newest]
    gone = [folder for folder in surplus(abandoned, older, kept, limit) if folder not in in_use]
    if gone and (problem := find_damage(newest)):
        raise OSError(f"the checkpoint just written is damaged, so no older one was deleted: {problem}")
    for folder in gone:
        # Renamed first: a half-deleted one is never loaded, and the next start removes the rest.
        shutil.rmtree(folder.rename(root / f".{folder.name}.partial"))
    return [f"removed: {folder.name} (--saved-checkpoint-limit {limit})" for folder in gone if folder in abandoned]


def surplus(abandoned: list[T], older: list[T], best: T | None, limit: int) -> list[T]:
    """Return which checkpoints go when another one is new, so that `limit` remain with it (0: all stay): those that were set
    aside first, then the oldest. The best one stays, and does not count."""
    old = abandoned + [checkpoint for checkpoint in older if checkpoint != best]
    return old[: max(0, len(old) + 1 - limit)] if limit else []


def refuse_unfinished(name: str) -> None:
    """Raise InputError if `name` is the folder of a run that has saved nothing yet."""
    root = Path(name)
    try:
        if (root / "config.json").exists() or list_checkpoints(root) or not (root / METRICS_FILE).is_file():
            return
        options = read_json(root / RUN_CONFIG)
        interval, last = int(options["save_interval"]), int(options["train_steps"])
        step = (newest_line(root / METRICS_FILE, "loss") or {"step": 0})["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # it is not the folder of a run: whoever opens it says what it is
    upcoming = min(last, (step // interval + 1) * interval) if interval else last
    saves = f"saves every {interval:,} steps, next" if interval else "saves"
    raise InputError(
        f"{name} holds no finished checkpoint yet; its run is at step {step:,} and {saves} after step {upcoming:,}"
    )
