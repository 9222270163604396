"""What a process does when its part of a run fails while other processes may wait for it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from gpt2xla.errors import InputError, RunFailed
from gpt2xla.processes.exits import SECONDS_FOR_MAIN, exit_now_on_signal, report
from gpt2xla.runtime.base import Runtime

_SECONDS_TO_END = 1


@contextlib.contextmanager
def leaving_together(runtime: Runtime) -> Iterator[None]:
    """Wrap one process's part of a run. If it fails, report and exit at once, so that the launcher ends the others.

    Joining threads or collectives first could wait for ever."""
    try:
        yield
        sys.stdout.flush()  # once all have closed, the first one to exit may have the launcher end the others
        runtime.close()
    except BaseException as error:
        if runtime.world_size == 1:
            raise
        if isinstance(error, InputError | RunFailed):  # every process may meet it; one reports it
            exit_now_on_signal(1)
            if not runtime.is_main and _wait_for_an_end(runtime, SECONDS_FOR_MAIN):
                os._exit(2 if isinstance(error, InputError) else 1)
        elif ended := _wait_for_an_end(runtime, _SECONDS_TO_END if runtime.is_main else SECONDS_FOR_MAIN):
            error = exited_early(ended)
        code = report(error)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


def exited_early(ranks: list[int]) -> RunFailed:
    """Return the error of a run of which `ranks` have exited."""
    which = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return RunFailed(f"{which} exited early and stopped the run; rerun the same command to resume")


def _wait_for_an_end(runtime: Runtime, seconds: float) -> list[int]:
    """Return the ranks that have exited, as soon as there are any.

    A process's connections close a moment before it has exited, so the error that they cause may come too early."""
    until = time.monotonic() + seconds
    while not (ended := runtime.ended_ranks()) and time.monotonic() < until:
        time.sleep(0.05)
    return ended
