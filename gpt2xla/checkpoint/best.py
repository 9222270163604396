"""The best validation of a run: what a resumed run must know of it, and what names its checkpoint. Knows no torch.

`best.json`, {"step", "valid_loss"}, is the truth about the checkpoint; `best` is a link to it, for other programs. Both are
written only when the checkpoint is whole, and the checkpoint that they named before is deleted only afterwards."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2xla.checkpoint.logged import newest_lines
from gpt2xla.checkpoint.run_folder import best_of, is_finished, list_checkpoints, point
from gpt2xla.config.paths import BEST_FILE, step_folder
from gpt2xla.errors import counted
from gpt2xla.files import write_whole
from gpt2xla.logs.sinks import METRICS_FILE

BEST = "best"


@dataclass(frozen=True)
class Best:
    """The lowest validation loss of a run so far, and since when it has not improved. All processes compute the same one."""

    step: int = 0  # after which it was measured; 0 if there was none
    loss: float | None = None  # in nats per token
    to_beat: float | None = None  # the loss from which an improvement counts; not always the lowest: see `after`
    unimproved: int = 0  # how many validations in a row were no improvement

    def after(self, step: int, loss: float, min_delta: float) -> Best:
        """Return what holds after one more validation.

        It is an improvement if `loss` is more than `min_delta` below the loss of the last improvement, so that many small
        steps count in the end, as in Keras and Lightning. NaN and infinity improve nothing."""
        is_lowest = math.isfinite(loss) and (self.loss is None or loss < self.loss)
        improves = math.isfinite(loss) and (self.to_beat is None or self.to_beat - loss > min_delta)
        return Best(
            step if is_lowest else self.step,
            loss if is_lowest else self.loss,
            loss if improves else self.to_beat,
            0 if improves else self.unimproved + 1,
        )

    def has_ended(self, patience: int) -> bool:
        """Whether a run with this --early-stopping-patience ends here. 0 never ends one."""
        return 0 < patience <= self.unimproved

    def why_ended(self, min_delta: float) -> str:
        """Return in words why the run ended early."""
        by, best = f" by more than {min_delta:g}" if min_delta else "", f"; {self.where()}" if self.step else ""
        return f"the validation loss has not improved{by} in {counted(self.unimproved, 'validation')}{best}"

    def where(self) -> str:
        return f"best {self.loss:.4f} at step {self.step:,}"

    def state(self) -> dict[str, Any]:
        """Return it as plain values, for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, state: dict[str, Any], last_step: int) -> Best:
        """Return what `state` was made of, in a checkpoint after `last_step`. Raises ValueError or TypeError if no run makes
        such a state."""
        best = cls(**state)
        numbers, losses = (best.step, best.unimproved), [x for x in (best.loss, best.to_beat) if x is not None]
        is_one = state.keys() == cls().state().keys()
        is_one &= all(type(number) is int and number >= 0 for number in numbers)
        is_one &= all(type(loss) is float and math.isfinite(loss) for loss in losses)
        if not is_one or best.step > last_step or (best.step == 0) != (best.loss is None):
            raise ValueError("it is not the best validation of a run")
        return best


def kept_in(root: Path, best: Best, until: int) -> Best:
    """Return `best` if its checkpoint is in `root`. Otherwise return the best of those that are: the one up to step `until`
    with the lowest loss in the run's log, or none. What counts towards the patience stays.

    Where no validation counts yet, none in the log does either: they may be measured otherwise."""
    if best.loss is None or _is_in(root, best):
        return best
    steps = {int(folder.name[5:]) for folder in list_checkpoints(root)}
    found = [
        (line["valid_loss"], line["step"])
        for line in newest_lines(root / METRICS_FILE, "valid_loss", until)
        if line["step"] in steps and type(line["valid_loss"]) is float
    ]
    loss, step = min(found, default=(None, 0))
    return dataclasses.replace(best, step=step, loss=loss)


def name_best(root: Path, best: Best) -> str | None:
    """Let best.json and the link name the checkpoint of `best`, if it is in `root`.

    Return a line for the user if the link is impossible. Raises OSError if best.json cannot be written."""
    if not _is_in(root, best):
        return None
    if best_of(root) != (best.step, best.loss):
        write_whole(root / BEST_FILE, json.dumps({"step": best.step, "valid_loss": best.loss}) + "\n")
    return point(root / BEST, step_folder(root, best.step))


def prepare_best(root: Path, best: Best | None) -> list[str]:
    """Make best.json and the link right for a run that continues, and return lines for the user.

    A crash may have left them at the best before. They may also name a checkpoint that is deleted, or that the run leaves
    behind when it goes back.

    Args:
        best: of the steps that the run continues; None if it does not keep its best."""
    was, is_there = best_of(root), (root / BEST_FILE).exists()
    if best and _is_in(root, best):
        name_best(root, best)
        return [f"{BEST_FILE}: {best.where()}"] if was != (best.step, best.loss) else []
    if (root / BEST).is_symlink():
        (root / BEST).unlink()
    (root / BEST_FILE).unlink(missing_ok=True)
    why = "no checkpoint here has a validation that counts" if best else "--keep-best is off"
    return [f"removed: {BEST_FILE} ({why})"] if is_there else []


def _is_in(root: Path, best: Best) -> bool:
    return best.step > 0 and is_finished(step_folder(root, best.step))
