"""Worker processes that do the same work on many pieces. The results come in the order of the pieces."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from gpt2xla.errors import RunFailed

T = TypeVar("T")

_work: Callable[..., Any]  # of a worker


def in_order(work: Callable[..., T], pieces: Iterable[tuple[Any, ...]], workers: int) -> Iterator[T]:
    """Yield `work(*piece)` for each piece, done by `workers` processes, or here if that is 1. Few pieces are held at a time.

    `work` is sent to each process once. Processes end with this one, however it ends. Raises what `work` raises, and
    RunFailed if a process was killed."""
    if workers == 1:
        yield from itertools.starmap(work, pieces)
        return
    pending: deque[Future[T]] = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work,)) as pool:
        try:
            for piece in pieces:
                pending.append(pool.submit(_do, *piece))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            fix = "it may have needed too much memory; choose a smaller --num-workers"
            raise RunFailed(f"a worker process ended early: {fix}") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(work: Callable[..., Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process ends the others
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True, name="end-with-parent").start()


def _do(*piece: Any) -> Any:
    return _work(*piece)
