"""Sends metrics to Weights & Biases."""

from __future__ import annotations

import json
import secrets
import string
from pathlib import Path
from typing import Any

from gpt2xla.config import RunConfig
from gpt2xla.files import read_json, write_whole
from gpt2xla.logs.background_sink import SECONDS_TO_CLOSE, BackgroundSink

WANDB_FILE = "wandb_run.json"  # the id of wandb's run for this folder, and the last step that was sent to it


class WandbSink(BackgroundSink):
    """Sends every line to wandb, in batches of the logging interval.

    The id of wandb's run is chosen here and kept in the folder, so that a run that died before its first checkpoint, or
    before wandb answered, resumes under the same id. Training steps that wandb already has are not sent again.

    Args:
        folder: the run's folder.
        run_id: the id in the checkpoint. It is used if the folder has none."""

    def __init__(self, config: RunConfig, folder: Path, run_id: str | None) -> None:
        super().__init__("wandb")
        options = config.wandb
        self._folder = folder
        # Testing a checkpoint is a separate run, although it logs to the same folder.
        self._file = None if config.general.do_test else folder / WANDB_FILE
        kept_id, self._sent = _read(self._file) if config.general.resume != "never" else (None, 0)
        known_id = options.wandb_resume_id or kept_id or run_id
        if known_id != kept_id:
            self._sent = 0
        letters = string.ascii_lowercase + string.digits  # those of wandb's own ids
        self.run_id: str = known_id or "".join(secrets.choice(letters) for _ in range(8))
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
        self._has_trained = False  # since this process began
        self._start()

    def _send(self) -> None:
        self._keep()
        import wandb

        # If wandb captured what is printed, printing would wait for it. Quiet, it prints three lines and not thirty.
        settings = wandb.Settings(console="off", quiet=True, show_info=False)
        if hasattr(settings, "finish_timeout"):  # older versions retry forever, even after the program's last line
            settings.finish_timeout = SECONDS_TO_CLOSE
        run = wandb.init(**self._settings, settings=settings)
        # A server says which steps it has. Offline, only our own record tells which steps were sent.
        first = self._sent + 1 if run.offline else run.step
        waiting: list[dict[str, Any]] = []
        for line in self._lines():
            waiting.append(line)
            if "loss" not in line or line["step"] % self._interval == 0:
                self._log_all(run, waiting, first)
        if not self._is_dead:
            self._log_all(run, waiting, first)
            run.finish()

    def _log_all(self, run: Any, waiting: list[dict[str, Any]], first: int) -> None:
        for line in waiting:
            self._log(run, line, first)
        waiting.clear()
        self._keep()

    def _log(self, run: Any, line: dict[str, Any], first: int) -> None:
        step, values = line["step"], {name: value for name, value in line.items() if name != "step"}
        self._has_trained |= "loss" in line
        if step < first:
            # A run that was stopped during the evaluations of a step repeats them first when it resumes. By then wandb takes
            # nothing more for that step, so they are logged with the next one.
            if self._has_trained or step < first - 1:
                return
            step = first
        if (file := self._folder / values.get("sketches", "")).is_file():
            import wandb

            values["sketches"] = wandb.Image(str(file))
        run.log(values, step=step)
        self._sent = max(self._sent, line["step"])

    def _keep(self) -> None:
        if self._file:
            write_whole(self._file, json.dumps({"id": self.run_id, "step": self._sent}) + "\n")


def _read(file: Path | None) -> tuple[str | None, int]:
    """Return the id and the last step that an earlier process recorded; (None, 0) if the record is missing or damaged."""
    try:
        values = read_json(file) if file else {}
        run_id, step = values.get("id"), values.get("step")
        return (run_id, step) if isinstance(run_id, str) and isinstance(step, int) else (None, 0)
    except (OSError, ValueError, AttributeError):
        return None, 0
