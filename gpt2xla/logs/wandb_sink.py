"""Weights & Biases as a view of `metrics.jsonl`, from a thread of its own: a slow, hanging or dead service costs a run no
step, and its end a bounded wait."""

from __future__ import annotations

import json
import os
import queue
import secrets
import string
import threading
from pathlib import Path
from typing import Any

from gpt2xla.config import RunConfig
from gpt2xla.files import read_json
from gpt2xla.logs.console import say

WANDB_FILE = "wandb_run.json"  # which of wandb's runs this folder's is, and the last step that was handed to it
_SECONDS_TO_CLOSE = 30  # as long as machines that are taken away often leave a process
_MOST_WAITING = 100_000  # lines, of about half a kilobyte


class WandbSink:
    """Hands every line to wandb, in batches of the logging interval. A failing wandb never disturbs the run: it is reported
    and left alone from then on.

    The id of wandb's run is chosen here and kept in the folder, so that a run that died before its first checkpoint, or
    before wandb answered, goes on as the same one. Steps that wandb has already are not sent again.

    Args:
        folder: that of the run.
        run_id: the id in the checkpoint, which counts where the folder knows none.
    """

    def __init__(self, config: RunConfig, folder: Path, run_id: str | None) -> None:
        options = config.wandb
        # A test of a checkpoint is no part of the run whose folder it is logged to.
        self._file = None if config.general.do_test else folder / WANDB_FILE
        kept_id, self._handed_on = _read(self._file) if config.general.resume != "never" else (None, 0)
        known_id = options.wandb_resume_id or kept_id or run_id
        if known_id != kept_id:
            self._handed_on = 0
        self.run_id: str = known_id or _new_id()
        self._settings: dict[str, Any] = {
            "project": options.wandb_project,
            "name": options.wandb_name,
            "notes": options.wandb_notes,
            "tags": [tag.strip() for tag in options.wandb_tags.split(",")] if options.wandb_tags else None,
            "id": self.run_id,
            "resume": "allow" if known_id else None,
            "config": config.to_flat(),
            "dir": folder,
        }
        self._interval = options.wandb_logging_interval
        self._has_trained = False  # in this process
        self._is_dead = False
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def write(self, line: dict[str, Any]) -> None:
        """Returns at once."""
        self._put(line)

    def close(self) -> None:
        """Wait until wandb has everything, but not for long."""
        self._put(None)
        if not self._is_dead:
            self._thread.join(_SECONDS_TO_CLOSE)
        if self._thread.is_alive():
            self._fail(f"no answer within {_SECONDS_TO_CLOSE} seconds of the run's end")

    def _put(self, line: dict[str, Any] | None) -> None:
        if self._is_dead:
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._fail(f"{_MOST_WAITING:,} lines wait for it")

    def _work(self) -> None:
        try:
            self._hand_on()
        except Exception as error:  # wandb raises its own, requests' and protobuf's errors
            self._fail(error)

    def _hand_on(self) -> None:
        self._keep()
        import wandb

        # Were wandb to see what is printed, printing would wait for it.
        settings = wandb.Settings(console="off")
        if hasattr(settings, "finish_timeout"):  # older ones try for ever, also after the last line of the program
            settings.finish_timeout = _SECONDS_TO_CLOSE
        run = wandb.init(**self._settings, settings=settings)
        # A server says what it has; without one there is only what was handed on.
        first = self._handed_on + 1 if run.offline else run.step
        waiting: list[dict[str, Any]] = []
        is_open = True
        while is_open:
            line = self._lines.get()
            if self._is_dead:
                return
            if line is not None:
                waiting.append(line)
            is_open = line is not None
            if line is None or "loss" not in line or line["step"] % self._interval == 0:
                for held_back in waiting:
                    self._log(run, held_back, first)
                waiting.clear()
                self._keep()
        run.finish()

    def _log(self, run: Any, line: dict[str, Any], first: int) -> None:
        step, values = line["step"], {name: value for name, value in line.items() if name != "step"}
        self._has_trained |= "loss" in line
        if step < first:
            # A run stopped in the evaluations of its last step makes up for them. wandb adds nothing to a step that is
            # over: the next one gets them.
            if self._has_trained or step < first - 1 or _has(run, values):
                return
            step = first
        run.log(values, step=step)
        self._handed_on = max(self._handed_on, line["step"])

    def _keep(self) -> None:
        if self._file:
            partial = self._file.with_name(f".{self._file.name}.partial")
            partial.write_text(json.dumps({"id": self.run_id, "step": self._handed_on}) + "\n", encoding="utf-8")
            os.replace(partial, self._file)

    def _fail(self, error: object) -> None:
        if not self._is_dead:
            self._is_dead = True
            reason = " ".join(str(error).split())
            say(f"wandb failed ({reason}); the run goes on, metrics.jsonl has everything", error=True)


def _has(run: Any, values: dict[str, Any]) -> bool:
    """Whether the evaluation is the last of its kind that wandb has."""
    measured = {name: value for name, value in values.items() if name not in ("tokens", "time")}
    return all(run.summary.get(name) == value for name, value in measured.items())


def _read(file: Path | None) -> tuple[str | None, int]:
    """Id and last step that an earlier process left; what is not ours counts as nothing."""
    try:
        values = read_json(file) if file else {}
        run_id, step = values.get("id"), values.get("step")
        return (run_id, step) if isinstance(run_id, str) and isinstance(step, int) else (None, 0)
    except (OSError, ValueError, AttributeError):
        return None, 0


def _new_id() -> str:
    """As wandb makes them."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
