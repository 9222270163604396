"""Sends metrics to Weights & Biases from a thread. A slow, hanging or dead service never delays a training step, and delays
the end of a run only for a limited time."""

from __future__ import annotations

import json
import queue
import secrets
import string
import threading
from pathlib import Path
from typing import Any

from gpt2xla.config import RunConfig
from gpt2xla.errors import in_one_line
from gpt2xla.files import read_json, write_whole
from gpt2xla.logs.console import say

WANDB_FILE = "wandb_run.json"  # the id of wandb's run for this folder, and the last step that was sent to it
_SECONDS_TO_CLOSE = 30  # preempted machines often leave a process that long
_MOST_WAITING = 100_000  # lines, each of about half a kilobyte


class WandbSink:
    """Sends every line to wandb, in batches of the logging interval. If wandb fails, this is reported once, nothing more is
    sent, and the run continues.

    The id of wandb's run is chosen here and kept in the folder, so that a run that died before its first checkpoint, or
    before wandb answered, resumes under the same id. Training steps that wandb already has are not sent again.

    Args:
        folder: the run's folder.
        run_id: the id in the checkpoint. It is used if the folder has none."""

    def __init__(self, config: RunConfig, folder: Path, run_id: str | None) -> None:
        options = config.wandb
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
        self._is_dead = False
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def write(self, line: dict[str, Any] | None) -> None:
        """Queue the line and return at once. None ends the thread."""
        if self._is_dead:
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._fail(f"{_MOST_WAITING:,} lines wait for it")

    def close(self) -> None:
        """Wait until wandb has received everything, or until the time limit."""
        self.write(None)
        if not self._is_dead:
            self._thread.join(_SECONDS_TO_CLOSE)
        if self._thread.is_alive():
            self._fail(f"no answer within {_SECONDS_TO_CLOSE} seconds of the run's end")

    def _work(self) -> None:
        try:
            self._send_lines()
        except Exception as error:  # wandb raises its own errors, and those of requests and protobuf
            self._fail(in_one_line(error))

    def _send_lines(self) -> None:
        self._keep()
        import wandb

        # If wandb captured what is printed, printing would wait for it. Quiet, it prints three lines and not thirty.
        settings = wandb.Settings(console="off", quiet=True, show_info=False)
        if hasattr(settings, "finish_timeout"):  # older versions retry forever, even after the program's last line
            settings.finish_timeout = _SECONDS_TO_CLOSE
        run = wandb.init(**self._settings, settings=settings)
        # A server says which steps it has. Offline, only our own record tells which steps were sent.
        first = self._sent + 1 if run.offline else run.step
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
            # A run that was stopped during the evaluations of a step repeats them first when it resumes. By then wandb takes
            # nothing more for that step, so they are logged with the next one.
            if self._has_trained or step < first - 1:
                return
            step = first
        run.log(values, step=step)
        self._sent = max(self._sent, line["step"])

    def _keep(self) -> None:
        if self._file:
            write_whole(self._file, json.dumps({"id": self.run_id, "step": self._sent}) + "\n")

    def _fail(self, reason: str) -> None:
        if not self._is_dead:
            self._is_dead = True
            say(f"wandb failed ({reason}); the run continues, and metrics.jsonl has everything", error=True)


def _read(file: Path | None) -> tuple[str | None, int]:
    """Return the id and the last step that an earlier process recorded; (None, 0) if the record is missing or damaged."""
    try:
        values = read_json(file) if file else {}
        run_id, step = values.get("id"), values.get("step")
        return (run_id, step) if isinstance(run_id, str) and isinstance(step, int) else (None, 0)
    except (OSError, ValueError, AttributeError):
        return None, 0
