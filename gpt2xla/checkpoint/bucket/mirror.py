"""Sends a run's folder to its bucket, in the background: training waits for the disk as ever, never for the network.

A checkpoint's files go first, `COMPLETE` last. While one is being sent, newer ones wait; of those that wait only the newest
one is sent, and the best one."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gpt2xla.checkpoint.bucket.arrival import RECORD, bucket_error
from gpt2xla.checkpoint.bucket.layout import ABANDONED, in_order, is_small_file, layout_of
from gpt2xla.checkpoint.folder import EVALUATED
from gpt2xla.checkpoint.run_folder import LATEST, best_of, list_checkpoints, surplus
from gpt2xla.checkpoint.seal import COMPLETE
from gpt2xla.config import RunConfig
from gpt2xla.config.paths import BEST_FILE, step_folder
from gpt2xla.errors import RunFailed, in_one_line
from gpt2xla.logs.console import say
from gpt2xla.logs.sinks import TEST_FILE
from gpt2xla.processes.lease import Lease, LeaseLost, Standing, held
from gpt2xla.storage import Bucket

UPLOADS_FILE = "uploads.jsonl"  # a line for each checkpoint that was sent: step, bytes, seconds, time
_LAST_TRIES = 3
_QUIET_SECONDS = 10.0  # of the wait at the end of a run, after which a line says what it is for
_TELLS_A_RATE = 10_000_000  # bytes; with fewer, most of the time goes into requests


class Mirror:
    """The bucket of a run, as the run's main process sees it: a `saver.Sender`. `mirroring` makes it."""

    def __init__(self, bucket: Bucket, lease: Lease, config: RunConfig) -> None:
        self.bucket, self.lease, self.folder = bucket, lease, config.general.folder
        self.limit, self.interval = config.train.saved_checkpoint_limit, config.general.upload_interval
        self._waiting: list[Path] = []  # checkpoints to send, oldest first
        self._sending: Path | None = None
        self._newest: Path | None = None  # of this folder
        self._safe = max(layout_of(bucket).whole, default="")
        self._failure: Exception | None = None  # of the last one that was to be sent
        self._sent_files: dict[str, tuple[int, int]] = {}  # size and time of change of small files, as they were sent
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="sending", daemon=True)
        self._thread.start()

    def send(self, checkpoint: Path) -> None:
        with self._changed:
            self._newest = checkpoint
            last = max(
                (_step(path.name) for path in (*self._waiting, self._sending) if path), default=_step(self._safe)
            )
            is_due = _step(checkpoint.name) >= last + self.interval or self._is_best(checkpoint)
            if is_due or checkpoint.name == self._safe:
                self._add(checkpoint)

    @property
    def sending(self) -> list[Path]:
        with self._changed:
            return [path for path in (self._sending, *self._waiting) if path]

    def safe_in_words(self) -> str:
        if not self._safe:
            return f"no checkpoint is in {self.bucket.url} yet"
        return f"the newest checkpoint in {self.bucket.url} is of step {_step(self._safe)}"

    def wait(self, seconds_left: Callable[[], float | None] = lambda: None) -> bool:
        begun, is_said = time.monotonic(), False
        for attempt in range(_LAST_TRIES):
            with self._changed:
                newest = self._newest
                if newest is None or (self._safe == newest.name and not self.sending):
                    return True
                if newest not in self.sending:  # left out by the interval, or it has failed
                    self._add(newest)
                while self._sending or self._waiting:
                    left = seconds_left()  # a signal that sets an end may come meanwhile
                    if left is not None and left <= 0:
                        return False
                    self._changed.wait(0.5 if left is None else min(left, 0.5))
                    if not is_said and time.monotonic() > begun + _QUIET_SECONDS:
                        is_said = True
                        say(f"waiting until {newest.name} is sent")
                left = seconds_left()
                is_over = self._ended or (left is not None and left <= 0)
                # A refusal stays one.
                if self._failure is None or is_over or isinstance(self._failure, PermissionError | LeaseLost):
                    return self._failure is None
            time.sleep(attempt)
        return False

    def close(self) -> None:
        """End the thread, and send what has changed since the last checkpoint. Raises OSError."""
        with self._changed:
            self._waiting.clear()
            self._ended = True
            self._changed.notify_all()
        if self._sending is None:
            self._thread.join()
            self.lease.check()
            self._send_small_files()

    def begin(self, step: int) -> None:
        """Make the bucket right for a run that continues after `step`, as `prepare_folder` does a folder: checkpoints of
        later steps are set aside, and what a killed process had not sent is sent. Raises InputError."""
        with bucket_error(self.bucket):
            for line in self._set_aside_after(step):
                say(line)
            if self._safe:
                self._prune(self._safe)  # a killed process may not have come to that
        here = [path for path in list_checkpoints(self.folder) if _step(path.name) <= step]
        if here and here[-1].name > self._safe:
            self.send(here[-1])

    def _set_aside_after(self, step: int) -> Iterator[str]:
        whole = layout_of(self.bucket).whole
        for name in [name for name in whole if _step(name) > step]:
            self.bucket.write(f"{name}/{ABANDONED}", b"")
            self.bucket.remove([f"{name}/{COMPLETE}"])
            yield f"set aside: {self.bucket.url}/{name} has {ABANDONED} instead of {COMPLETE} now"
        self._safe = max((name for name in whole if _step(name) <= step), default="")
        if whole:
            self.bucket.write(LATEST, self._safe.encode())

    def _add(self, checkpoint: Path) -> None:
        self._waiting = [path for path in self._waiting if self._is_best(path) and path != checkpoint]
        self._waiting.append(checkpoint)
        self._changed.notify_all()

    def _is_best(self, checkpoint: Path) -> bool:
        best = best_of(self.folder)
        return best is not None and step_folder(self.folder, best[0]) == checkpoint

    def _work(self) -> None:
        while True:
            with self._changed:
                self._sending = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if self._ended:
                    return
                checkpoint = self._sending = self._waiting.pop(0)
            failure: Exception | None = None
            try:
                self._send(checkpoint)
            except Exception as error:  # whatever a storage's client raises: the run must not hang in `wait`
                failure = error
                lies = "" if isinstance(error, LeaseLost) else f"; it lies in {checkpoint}, and {self.safe_in_words()}"
                say(f"{checkpoint.name} was not sent: {in_one_line(error)}{lies}", error=True)
            with self._changed:
                self._failure = failure

    def _send(self, checkpoint: Path) -> None:
        name, begun = checkpoint.name, time.monotonic()
        self.lease.check()
        self._send_small_files()  # so that the log holds every step up to the checkpoint's
        size = send_whole(self.bucket, checkpoint, self.lease.check)
        if name >= self._safe:
            self.lease.check()
            self.bucket.write(LATEST, name.encode())
            self._safe = name
        if size:
            self._report(name, size, time.monotonic() - begun)
        try:
            self.lease.check()
        except LeaseLost:  # between that check and the write: this machine was frozen
            self.bucket.write(LATEST, max(layout_of(self.bucket).whole, default=name).encode())
            raise
        self._send_best()
        self._prune(name)

    def _report(self, name: str, size: int, seconds: float) -> None:
        rate = f" ({size / 1e6 / seconds:,.0f} MB/s)" if size > _TELLS_A_RATE else ""
        say(f"sent {name}: {size / 1e6:,.1f} MB in {seconds:.1f} s{rate}")
        line = {"step": _step(name), "bytes": size, "seconds": round(seconds, 3), "time": time.time()}
        with contextlib.suppress(OSError), (self.folder / UPLOADS_FILE).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def _send_small_files(self) -> None:
        """Send what has changed, except best.json, which may name a checkpoint that is not there yet."""
        for file in sorted(self.folder.rglob("*")):
            name = file.relative_to(self.folder).as_posix()
            if name == BEST_FILE or not is_small_file(name) or file.is_symlink() or not file.is_file():
                continue
            state = (file.stat().st_size, file.stat().st_mtime_ns)
            if self._sent_files.get(name) != state:
                content = file.read_bytes()
                # A log may be growing: no line of it is cut.
                self.bucket.write(name, content[: content.rfind(b"\n") + 1] if file.suffix == ".jsonl" else content)
                self._sent_files[name] = state

    def _send_best(self) -> None:
        best = best_of(self.folder)
        if best is None:
            self.bucket.remove([BEST_FILE])
        elif self.bucket.read(f"{step_folder(self.folder, best[0]).name}/{COMPLETE}") is not None:
            self.bucket.write(BEST_FILE, (self.folder / BEST_FILE).read_bytes())

    def _prune(self, newest: str) -> None:
        """Delete what --saved-checkpoint-limit lets go, and what interrupted uploads left."""
        layout, best = layout_of(self.bucket), best_of(self.folder)
        kept = step_folder(self.folder, best[0]).name if best else ""
        older = [name for name in layout.whole if name < newest]
        gone = surplus(layout.abandoned, older, kept, self.limit)
        if self.limit:
            neither = layout.checkpoints.keys() - set(layout.whole) - set(layout.abandoned)
            gone += [name for name in neither if self.bucket.read(f"{name}/{COMPLETE}") is None]
        for name in gone:
            self.bucket.remove(f"{name}/{file}" for file in in_order({COMPLETE, *layout.checkpoints[name]}))


@contextlib.contextmanager
def mirroring(bucket: Bucket, config: RunConfig, seen: Standing, lost: Callable[[str], None]) -> Iterator[Mirror]:
    """Hold the lease of a run's bucket, and send what is saved until the end of the block.

    Args:
        seen: what `bring` returned.
        lost: called with the reason if another run takes over.

    Raises InputError if another run holds the bucket, or it cannot be written to, and RunFailed if the last small files
    could not be sent."""
    what, folder = f"{bucket.option} {bucket.url}", config.general.folder
    with contextlib.ExitStack() as holding:
        with bucket_error(bucket):
            lease = holding.enter_context(held(bucket, what, folder / RECORD, say, after=seen, lost=lost))
            mirror = Mirror(bucket, lease, config)
        try:
            yield mirror
        except BaseException:
            with contextlib.suppress(OSError):
                mirror.close()
            raise
        try:
            mirror.close()
        except OSError as error:
            raise RunFailed(
                f"metrics.jsonl and other small files in {bucket.url} are not up to date: {in_one_line(error)}; they lie "
                f"in --scratch-dir {config.general.scratch_dir}; rerun the same command to send them"
            ) from None


def send_whole(bucket: Bucket, checkpoint: Path, check: Callable[[], None] = lambda: None) -> int:
    """Send a checkpoint, `COMPLETE` last, and return how many bytes that was: 0 if it is there already.

    Args:
        check: called before what makes it whole; it may raise.

    Raises OSError."""
    name, complete = checkpoint.name, (checkpoint / COMPLETE).read_bytes()
    there = bucket.read(f"{name}/{COMPLETE}")
    if there == complete:
        if (mark := checkpoint / EVALUATED).exists():
            bucket.write(f"{name}/{EVALUATED}", mark.read_bytes())
        return 0
    if there is not None:
        bucket.remove([f"{name}/{COMPLETE}"])
    files = [file for file in checkpoint.rglob("*") if file.is_file() and file.name != COMPLETE]
    bucket.send({f"{name}/{file.relative_to(checkpoint).as_posix()}": file for file in files})
    check()
    bucket.remove([f"{name}/{ABANDONED}"])
    bucket.write(f"{name}/{COMPLETE}", complete)
    return sum(file.stat().st_size for file in files)


def send_tests(bucket: Bucket, folder: Path) -> None:
    """Send what --do-test has added to."""
    if (file := folder / TEST_FILE).exists():
        with bucket_error(bucket):
            bucket.write(TEST_FILE, file.read_bytes())


def _step(name: str) -> int:
    return int(name[5:]) if name else 0
