"""Sends finished files to an object store in a thread, in order, while the next ones are written."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path

from gpt2xla.storage import Bucket

MOST_UNSENT = 2  # files on this disk that are complete; then the writer waits


class Sender:
    """A thread that does one thing after another, in the order given. After a failure it does nothing more, and every method
    raises what happened: an OSError of the bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._unsent, self._undone = 0, 0  # files, and jobs of any kind
        self._error: BaseException | None = None
        # A daemon: who stops the program waits for no upload. The next preparation sends that file again.
        threading.Thread(target=self._work, daemon=True, name="send").start()

    def send(self, name: str, file: Path) -> None:
        """Copy a file to the object `name` and remove it. Waits while too many are unsent."""
        self.then(lambda: self._send(name, file), files=1)
        self._wait(lambda: self._unsent < MOST_UNSENT)

    def then(self, action: Callable[[], None], files: int = 0) -> None:
        """Do `action` after all that was given before. `files`: how many it sends."""
        self.check()
        with self._changed:
            self._undone += 1
            self._unsent += files
        self._jobs.put(action)

    def check(self) -> None:
        """Raise what has failed."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until all is done."""
        self._wait(lambda: self._undone == 0)

    def stop(self) -> None:
        """Begin nothing more."""
        with self._changed:
            self._error = self._error or RuntimeError("the preparation has ended")
        self._jobs.put(None)

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._error is not None)
        self.check()

    def _send(self, name: str, file: Path) -> None:
        self._bucket.send({name: file})
        file.unlink()
        with self._changed:
            self._unsent -= 1

    def _work(self) -> None:
        while (action := self._jobs.get()) is not None:
            if self._error is None:
                try:
                    action()
                except BaseException as error:
                    self._error = error
            with self._changed:
                self._undone -= 1
                self._changed.notify_all()
