"""Saves a run's checkpoints in the background: training waits for the copy to host memory, not for the disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gpt2xla.checkpoint import folder as checkpoint
from gpt2xla.checkpoint import run_folder
from gpt2xla.checkpoint.best import Best, name_best
from gpt2xla.config import RunConfig
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.logs.console import say
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Runtime
from gpt2xla.runtime.stop import Stop


class Sender(Protocol):
    """What sends checkpoints elsewhere, in the background: `bucket.mirror.Mirror`."""

    @property
    def sending(self) -> list[Path]:
        """Checkpoints that are being sent or wait for it: they must stay."""

    def send(self, checkpoint: Path) -> None:
        """Send a checkpoint that was just written or changed, unless it is too early for another one."""

    def wait(self, seconds_left: Callable[[], float | None] = lambda: None) -> bool:
        """Wait until the newest checkpoint is sent, or no seconds are left (None: no limit). Return whether it is sent."""

    def safe_in_words(self) -> str:
        """Return which of the checkpoints that were sent is the newest, for a message."""


class Saver:
    """Writes checkpoints of a run to its folder, and removes the oldest ones.

    Args:
        run_state: returns what a resumed run needs beside weights, optimizer and runtime: plain values, of which "best" is
            the best validation. Called by the main process when all updates before the checkpoint are logged.
        mirror: sends what is written to the run's bucket, if it has one."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        model: GPT2,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer | None,
        settings: GenerationSettings,
        run_state: Callable[[], dict[str, Any]],
        stop: Stop,
        mirror: Sender | None = None,
    ) -> None:
        self.config, self.runtime, self.model, self.optimizer = config, runtime, model, optimizer
        self.tokenizer, self.settings, self.run_state, self.stop = tokenizer, settings, run_state, stop
        self.mirror = mirror
        self.folder = config.general.folder
        self._writes = BackgroundSaves(self._failed)
        self._has_no_link = False  # and that was reported

    def save(self, step: int, is_evaluated: bool) -> None:
        """Copy the state after `step` to host memory and start writing it. Collective.

        Args:
            is_evaluated: whether the evaluations due after `step` are done; if not, a resumed run makes up for them."""
        self.stop.begin_save()
        shards = run_folder.shards_folder(self.folder, step)
        is_shared = self.runtime.world_size == 1 or not self.config.general.is_in_bucket
        weights, state = self.runtime.snapshot(self.model, self.optimizer, shards if is_shared else None)
        if self.runtime.is_main:
            training = {"step": step, "is_evaluated": is_evaluated, **state, **self.run_state()}
            self._writes.start(partial(self._write, weights, training, shards))
        else:
            self.stop.end_save()

    def keep(self, step: int, is_evaluated: bool) -> None:
        """Note in the checkpoint that the run resumed whether the evaluations due after it are done now. A run that resumed
        one of another folder saves it in its own. Collective."""
        folder = run_folder.step_folder(self.folder, step)
        if not folder.is_dir():
            self.save(step, is_evaluated)
        elif is_evaluated and self.runtime.is_main:
            try:
                checkpoint.mark_evaluated(folder, best := self.run_state()["best"])
                self._name_best(best)
                if self.mirror:
                    self.mirror.send(folder)
            except OSError as error:
                say(f"{folder}: {error.strerror}; when resumed, it is evaluated again", error=True)

    def wait(self) -> str:
        """Wait until nothing is being written, or sent. Return what is wrong with the last checkpoint: "" if it is on the
        disk, and in the run's bucket."""
        is_written = self._writes.wait()
        unsent = self._unsent(self.mirror) if self.mirror else ""  # of an older one, if this one was not written
        if is_written:
            return unsent
        safe = f"; {self.mirror.safe_in_words()}" if self.mirror else ""
        return f"was not saved; fix the error above{safe}"

    def _unsent(self, mirror: Sender) -> str:
        general = self.config.general
        self.stop.begin_save()  # one more signal does not end the run
        try:
            if mirror.wait(lambda: self.stop.seconds_of_grace(general.grace_seconds)):
                return ""
        finally:
            self.stop.end_save()
        return f"was not sent: {mirror.safe_in_words()}; it is saved in --scratch-dir {general.scratch_dir}"

    def _write(self, weights: dict[str, Tensor], training: dict[str, Any], shards: Path) -> None:
        try:
            written = checkpoint.save(
                self.folder, config=self.config, weights=weights, training=training, tokenizer=self.tokenizer,
                settings=self.settings, devices=self.runtime.description, shards=shards,
            )  # fmt: skip
        finally:
            self.stop.end_save()
        self._report(run_folder.point(self.folder / run_folder.LATEST, written))
        self._name_best(training["best"])
        limit, in_use = self.config.train.saved_checkpoint_limit, self.mirror.sending if self.mirror else []
        for note in run_folder.prune(self.folder, written, limit, in_use):
            say(note)
        if self.mirror:
            self.mirror.send(written)

    def _name_best(self, best: dict[str, Any]) -> None:
        if self.config.train.keeps_best:
            self._report(name_best(self.folder, Best(**best)))

    def _report(self, problem: str | None) -> None:
        """Tell the user once why there is no link."""
        if problem and not self._has_no_link:
            self._has_no_link = True
            say(problem)

    def _failed(self, error: OSError) -> None:
        continues = self.config.train.on_save_error == "go-on"
        say(f"{error}; older checkpoints are good; training {'continues' if continues else 'stops'}", error=True)
        if not continues:
            self.stop.request("a checkpoint that could not be written")


class BackgroundSaves:
    """Writes in a thread, one checkpoint at a time.

    Args:
        failed: called in that thread with the OSError of a write that failed."""

    def __init__(self, failed: Callable[[OSError], None]) -> None:
        self._failed = failed
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        self._last: Future[bool] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Call `write` in the thread, after the write before it has ended. Raises what that one raised, except OSError."""
        self.wait()
        self._last = self._thread.submit(self._write, write)

    def wait(self) -> bool:
        """Wait until nothing is being written. Return whether the last write succeeded."""
        return self._last is None or self._last.result()

    def _write(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except OSError as error:
            self._failed(error)
            return False
        return True
