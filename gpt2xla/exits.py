"""How a process ends: which exit code, what it prints, and what becomes of the other processes of its run."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from gpt2xla.errors import InputError, RunFailed, is_out_of_memory

if TYPE_CHECKING:  # it imports torch, for which --help must not wait
    from gpt2xla.runtime.base import Runtime

_NO_READER = 128 + signal.SIGPIPE

# If all processes fail alike, the main one reports, and the launcher ends the others before they do so too.
_SECONDS_FOR_MAIN = 3
_SECONDS_TO_END = 1

# Where a launcher names a file in this variable, only the process that makes it reports: on a busy machine the main one may
# need longer than that.
REPORT_ONCE = "GPT2XLA_REPORT_ONCE"


def exit_code(main: Callable[[], None]) -> int:
    """Run `main` and give the process's exit code: 0 done, 1 the run failed, 2 the input is wrong, 130 interrupted, 141 when
    what read its output has ended.

    An error meant for the user becomes one line on stderr, once per host however many processes meet it; every other
    exception keeps its traceback (exit code 1).
    """
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name or a sample that the terminal cannot show must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    ending: SystemExit | None = None
    try:
        try:
            main()
        except SystemExit as end:  # --help, for one
            ending = end
        print(end="", flush=True)
    except (Exception, KeyboardInterrupt) as error:
        is_known = isinstance(error, InputError | RunFailed | KeyboardInterrupt) or is_out_of_memory(error)
        if not (is_known or _is_disk_full(error) or _has_no_reader(error)):
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_SECONDS_FOR_MAIN)
        return report(error)
    if ending:
        raise ending
    return 0


def settled(code: int) -> int:
    """`code`, with which the program ends from here on at once, should a signal come while it is on its way out."""
    if threading.current_thread() is threading.main_thread():  # in another, Python lets no signal be handled
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(code))
    return code


def report(error: BaseException) -> int:
    """Print what went wrong; the exit code that goes with it. Nothing where the reader of a pipe, such as head, has ended:
    then the code is the one of programs that SIGPIPE ends."""
    if _has_no_reader(error):
        _silence()
        return _NO_READER
    if is_out_of_memory(error):
        error = RunFailed("out of memory; end other programs, or choose a smaller batch or model")
    if _is_disk_full(error):
        _silence()
        error = RunFailed("the disk that is written to is full, or your quota on it; free some space and start again")
    if isinstance(error, InputError | RunFailed):
        if _is_first_to_report():
            line = str(error).replace("\n", "\\n")  # a name in it may hold one
            try:
                print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
            except BrokenPipeError:
                _silence()
        return 2 if isinstance(error, InputError) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    traceback.print_exception(error)
    return 1


def _has_no_reader(error: BaseException) -> bool:
    """Whether `error` is that of writing to standard output or standard error. Other connections break, too."""
    return isinstance(error, BrokenPipeError) and any(map(_is_broken, (sys.stdout, sys.stderr)))


def _is_disk_full(error: BaseException) -> bool:
    """Also of standard output that goes to a file."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _open_closed_streams() -> None:
    """Let a program that is started with standard streams closed, as `>&-` does, write to nowhere. Else the next files that
    it opens would have their numbers, and get what libraries write to these."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  it stays open


def _silence() -> None:
    """Write to nowhere what cannot be written: at its exit Python would try again, and report that."""
    for stream in (sys.stdout, sys.stderr):
        if _is_broken(stream) or not _takes_the_rest(stream):
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def _takes_the_rest(stream: TextIO) -> bool:
    try:
        stream.flush()
    except OSError:
        return False
    return True


def _is_broken(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError, AttributeError):  # no file of the system's, or none at all
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _is_first_to_report() -> bool:
    file = os.environ.get(REPORT_ONCE) or _file_of_torchrun()
    try:
        if file:
            os.close(os.open(file, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _file_of_torchrun() -> Path | None:
    """One for all processes that it started here: each has a folder of its own beside the others', until all have ended."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(own).parents[1] / "gpt2xla-reported" if own and Path(own).parent.is_dir() else None


@contextlib.contextmanager
def leaving_together(runtime: Runtime) -> Iterator[None]:
    """Around one process's part of a run. If it fails where others may wait for it for ever, report and leave at once,
    without joining threads or collectives: then the launcher ends the others."""
    try:
        yield
    except BaseException as error:
        if runtime.world_size == 1:
            raise
        if isinstance(error, InputError | RunFailed):  # which all may meet, and one is to report
            settled(1)
            if not runtime.is_main and _wait_for_an_end(runtime, _SECONDS_FOR_MAIN):
                os._exit(2 if isinstance(error, InputError) else 1)
        elif ended := _wait_for_an_end(runtime, _SECONDS_TO_END if runtime.is_main else _SECONDS_FOR_MAIN):
            ranks = f"rank{'s' if len(ended) > 1 else ''} {', '.join(map(str, ended))}"
            error = RunFailed(f"{ranks} ended early, and with it the run; start the same command again to go on")
        code = report(error)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)
    runtime.close()


def _wait_for_an_end(runtime: Runtime, seconds: float) -> list[int]:
    """The ranks that have ended, as soon as there are any. A process's connections close a moment before it has ended, so an
    error that tells of them may come too early."""
    until = time.monotonic() + seconds
    while not (ended := runtime.ended_ranks()) and time.monotonic() < until:
        time.sleep(0.05)
    return ended
