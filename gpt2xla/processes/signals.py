"""Turns the first SIGTERM or Ctrl-C into a request to stop, says so at once, and passes it on to worker processes."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from gpt2xla.errors import InputError, RunFailed
from gpt2xla.processes.exits import is_first

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Where a launcher passes Ctrl-C on, a process receives it twice; both count as one request.
_SECONDS_OF_ONE_REQUEST = 1.0
_ENDS = b"\0"  # for the watching thread; signals count from 1


class StopSignals:
    """While active, the first SIGTERM or SIGINT requests a stop instead of ending the process.

    A second one, a second or more later, ends the process at once, unless a checkpoint is being written; then
    a third one does. Until a trainer calls `handle`, both signals do what they did before.

    Python calls a signal's handler between two of its own instructions. While the main thread is inside a long call of C,
    such as a slow step or a compile, that would be late: a thread that waits for the signal's byte does the work then.

    Workers get the signals too. Pickled as an argument of a worker process, this object becomes a new, active one in the
    worker's main thread, which is the only thread where Python lets signals be handled."""

    def __init__(self) -> None:
        self.has_nothing_to_save = False  # so that the first signal ends the process
        self.received: str | None = None  # name of the signal that requested the stop
        self.received_at = math.inf  # by the monotonic clock
        self._saves = 0  # that are under way
        self._after = ""  # what is done before the stop, in words; empty until a trainer promises to act on `received`
        self._newest: Callable[[], str] = str
        self._requests = 0
        self._at = -math.inf  # the time of the last request
        self._has_waited = False  # whether a signal was answered with the end of the save
        self._before: dict[int, Any] = {}
        self._lock = threading.RLock()  # the handler may interrupt itself
        self._pipe: tuple[int, int] | None = None
        self._fd_before = -1
        self._left: deque[int] = deque()  # signals that the thread has left to the handler
        self._thread: threading.Thread | None = None

    def handle(self, after: str, newest: Callable[[], str]) -> None:
        """Promise to act on `received`.

        Args:
            after: what is done before the run stops, in words.
            newest: returns which checkpoint is the newest, in words."""
        self._newest, self._after = newest, after

    def begin_save(self) -> None:
        """Note that a checkpoint is being written. A second signal lets that finish."""
        with self._lock:
            self._saves += 1

    def end_save(self) -> None:
        with self._lock:
            self._saves -= 1

    def end_step(self) -> None:
        """Note that a step has been made since the start."""
        self.has_nothing_to_save = False

    @property
    def is_handled(self) -> bool:
        return self._after != ""

    def __enter__(self) -> StopSignals:
        global _active
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            self._fd_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, args=self._pipe[:1], name="signals", daemon=True)
            self._thread.start()
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
            _active = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        global _active
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe and self._thread:
            signal.set_wakeup_fd(self._fd_before)
            os.write(self._pipe[1], _ENDS)
            self._thread.join()
            for end in self._pipe:
                os.close(end)
            self._pipe = _active = None
        # The signal ended workers: before they began to train, or because it came twice. Otherwise they say how they ended.
        if kind and self.received and not (self.is_handled or issubclass(kind, SystemExit | InputError | RunFailed)):
            raise SystemExit(128 + signal.Signals[self.received])

    def __reduce__(self) -> tuple[Callable[[], StopSignals], tuple[()]]:
        return _in_worker, ()

    def _watch(self, pipe: int) -> None:
        """Act on signals as soon as they arrive, even if the main thread is inside a call of C."""
        while True:
            select.select([pipe], [], [])
            numbers = self._arrived()
            if not self.is_handled:
                self._left += filter(_SIGNALS.__contains__, numbers)
            else:
                for number in numbers:
                    self._act(number)
            if _ENDS in numbers:
                return

    def _arrived(self) -> bytes:
        """Return the numbers of the signals that came since the last call, in whichever thread. Each is returned once."""
        try:
            return os.read(self._pipe[0], 1024) if self._pipe else b""
        except BlockingIOError:
            return b""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Python's own handler, in the main thread."""
        workers = [] if self.is_handled else multiprocessing.active_children()
        if not (workers or self.is_handled):
            self._left.clear()
            self._arrived()
            self._as_before(number, frame)
        elif workers:
            self._pass_on(number, frame, workers)
        elif self._arrived() or self._left or not self._pipe:
            self._left.clear()
            self._act(number)

    def _act(self, number: int) -> None:
        """Act on a signal as the process that trains."""
        if number not in _SIGNALS or not self._counts(number):
            return
        # Who pressed Ctrl-C need not read which signal that is; the line fits 80 columns without.
        name, again = (
            ("", "press again") if number == signal.SIGINT else (f"{signal.Signals(number).name}: ", "send it again")
        )
        if self._requests == 1 and not self.has_nothing_to_save:
            if is_first("stopping"):
                _say(f"{name}stopping with a checkpoint after {self._after}; {again} to stop without one")
        elif self._saves and not self._has_waited:
            self._has_waited = True
            if is_first("saving"):
                _say(f"{name}a checkpoint is being written, then the run ends; {again} to end at once")
        else:
            self._end_at_once(number, name)

    def _counts(self, number: int) -> bool:
        """Return whether the signal is a new request, and count it."""
        with self._lock:
            now = time.monotonic()
            if now - self._at <= _SECONDS_OF_ONE_REQUEST:
                return False
            self._at, self._requests = now, self._requests + 1
            if self.received is None:
                self.received, self.received_at = signal.Signals(number).name, now
            return True

    def _end_at_once(self, number: int, name: str) -> NoReturn:
        if is_first("ended"):
            with contextlib.suppress(Exception):  # whatever lies in the run's folder: the run must end
                _say(f"{name}ended at once; {self._newest()}")
        os._exit(128 + number)

    def _pass_on(self, number: int, frame: FrameType | None, workers: list[Any]) -> None:
        """Act on a signal as the process that has started `workers`. They decide what the first two mean."""
        if not self._counts(number):
            return
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, number if self._requests <= 2 else signal.SIGKILL)
        if self._requests > 2:
            self._as_before(number, frame)

    def _as_before(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, before)
            os.kill(os.getpid(), number)
            if before == signal.SIG_DFL:  # process 1 of a container, which the default does not end
                os._exit(128 + number)


def is_saving() -> bool:
    """Tell whether this process is writing a checkpoint."""
    return _active is not None and _active._saves > 0


@contextlib.contextmanager
def compiling(*, before_training: bool) -> Iterator[None]:
    """Wrap a compile, for which torch starts other processes.

    Those, if this thread starts them, never receive SIGTERM or Ctrl-C, which a whole group of processes may get: torch would
    wait for ever for one that has ended. This process's other threads still receive both. `before_training`, a signal ends
    the process at once, until `StopSignals.end_step`: a compile may take longer than who sent it waits, and nothing is
    lost."""
    stop = _active
    if stop is None:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    stop.has_nothing_to_save |= before_training
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say(line: str) -> None:
    """Print in a signal's handler, where Python's streams may be in use: past them, over a progress bar and the ^C."""
    start = "\r\033[K" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{start}{line}\n".encode())


def _in_worker() -> StopSignals:
    return StopSignals().__enter__()


_active: StopSignals | None = None


def _leave_to_parent() -> None:
    """In a forked process: its signals must not appear in the parent's pipe, and the thread is not there."""
    if _active:
        _active._pipe = _active._thread = None
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_to_parent)
