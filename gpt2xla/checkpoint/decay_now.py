"""--decay-now: a run that decays from one of its checkpoints, and that its command, given again, continues.

The decay's `run_config.json` names the checkpoint (`resume`), the length (`decay_now`) and the end (`train_steps`), so that
it resumes without the flags, too."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from gpt2xla.checkpoint import run_folder
from gpt2xla.checkpoint.seal import find_damage
from gpt2xla.config import OPEN_ENDED, OptimConfig, RunConfig
from gpt2xla.config.paths import best_checkpoint, is_url
from gpt2xla.errors import InputError, as_named, counted
from gpt2xla.files import read_json
from gpt2xla.optim.schedule import learning_rate

_FLAGS = {"resume", "decay_now"}


def without_flags_if_under_way(config: RunConfig) -> RunConfig:
    """Return the run without --resume and --decay-now if --checkpoints-dir holds the decay that they ask for: its newest
    checkpoint knows the rest."""
    asked, root = config.general.resume, config.general.folder
    named = asked if is_url(asked) else str(best_checkpoint(asked) or run_folder.followed(Path(asked)))
    newest = next((folder for folder in reversed(run_folder.list_folders(root)) if find_damage(folder) is None), None)
    if newest is None or not _is_of_decay(newest, named, config.optim.decay_now):
        return config
    return dataclasses.replace(
        config,
        general=dataclasses.replace(config.general, resume="auto"),
        optim=dataclasses.replace(config.optim, decay_now=None),
        given=config.given - _FLAGS,
    )


def _is_of_decay(newest: Path, named: str, steps: int | None) -> bool:
    try:
        saved = read_json(newest / run_folder.RUN_CONFIG)
        same = os.path.realpath(named) in (os.path.realpath(saved["resume"]), os.path.realpath(newest))
        from_here = same or as_named(named) == saved["resume"]
        return from_here and saved["decay_now"] == steps
    except (OSError, ValueError, KeyError, TypeError):
        return False  # of an older version, or not ours: whoever resumes it says so


def begin(config: RunConfig, trained: OptimConfig, source: Path, step: int) -> tuple[RunConfig, str]:
    """Return the run that decays from the checkpoint `source` after `step` on and then ends, and a note for the user.

    Args:
        trained: the schedule with which `source` was trained.

    Raises InputError if the rate there is not the one of an open-ended phase."""
    steps = config.optim.decay_now
    assert steps is not None
    asked = f"--decay-now {steps}: {source}"
    if trained.decay_method not in OPEN_ENDED:
        raise InputError(
            f"{asked} was trained with --decay-method {trained.decay_method}, which decays all the time; it needs a run "
            "with wsd, constant or inverse-sqrt"
        )
    assert isinstance(trained.warmup_steps, int)
    if step < trained.warmup_steps:
        raise InputError(
            f"{asked} lies in the warm-up of {counted(trained.warmup_steps, 'step')}; choose a checkpoint after it"
        )
    if step > trained.decay_start and trained.final_decay:
        raise InputError(
            f"{asked} lies in or after a final decay, which began at step {trained.decay_start}; choose a checkpoint up to "
            "that step, or leave --decay-now out to continue this decay"
        )
    decaying = dataclasses.replace(
        config,
        general=dataclasses.replace(config.general, resume=as_named(source)),
        train=dataclasses.replace(config.train, train_steps=step + steps, epochs=None),
    )
    rate = learning_rate(decaying.schedule, config.model.d_model, step)
    return decaying, (
        f"decay: from {rate:.2e} after step {step:,} to {config.optim.min_lr:.2e} at step {step + steps:,}, where the run "
        "ends"
    )


def continued(config: RunConfig, resumed: RunConfig) -> RunConfig:
    """Return the run that continues from a checkpoint of a decay: the same decay, or, if the user set another length, the
    schedule of before."""
    is_trained_on = "epochs" in config.given or config.train.train_steps != resumed.train.train_steps
    if is_trained_on:
        return dataclasses.replace(config, optim=dataclasses.replace(config.optim, decay_now=None))
    return dataclasses.replace(config, general=dataclasses.replace(config.general, resume=resumed.general.resume))
