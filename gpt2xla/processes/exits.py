"""How a process ends: its exit code, and the one line that it prints."""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import json
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

from gpt2xla.errors import InputError, RunFailed, as_named, is_out_of_memory
from gpt2xla.processes.quiet import hide_remarks

_NO_READER = 128 + signal.SIGPIPE

_BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # of lines, and what else a terminal obeys

# If all processes fail alike, the main one reports. The launcher ends the others before they report too.
SECONDS_FOR_MAIN = 3

# A launcher may name a file in this variable. Then only the process that creates it, with what it reports in its name,
# reports that, however slow the machine is.
REPORT_ONCE = "GPT2XLA_REPORT_ONCE"


def run_and_exit(main: Callable[[], None]) -> NoReturn:
    """Run the `main` of a program with threads of other libraries, and exit with its `exit_code`.

    What is registered with atexit is done. Then the process ends without taking Python itself apart: a library's thread
    that wants Python's lock in that moment would abort the process ("terminate called without an active exception"), and
    torchrun would report a finished run as failed."""
    codes: list[int] = []
    atexit.register(lambda: _leave(codes[0]) if codes else None)  # registered first, so that it is called last
    codes.append(exit_now_on_signal(exit_code(main)))
    sys.exit(codes[0])


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def exit_code(main: Callable[[], None]) -> int:
    """Run `main` and return the process's exit code.

    0 done, 1 the run failed, 2 the input is wrong, 130 or 143 ended by Ctrl-C or SIGTERM, 141 the reader of our output (such
    as head) has exited; SystemExit may bring another. An error meant for the user becomes one line on stderr, once per host.
    Any other exception keeps its traceback (code 1).
    """
    _open_closed_streams()
    hide_remarks()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal cannot show must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    code = 0
    try:
        try:
            main()
        except SystemExit as end:  # such as --help, or a run that a signal has ended
            if isinstance(end.code, str):  # which Python prints
                raise
            code = int(end.code or 0)
        print(end="", flush=True)
    except (Exception, KeyboardInterrupt) as error:
        is_known = isinstance(error, InputError | RunFailed | KeyboardInterrupt) or is_out_of_memory(error)
        if not (is_known or is_disk_full(error) or _has_no_reader(error)):
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SECONDS_FOR_MAIN)
        return report(error)
    return code


def exit_now_on_signal(code: int) -> int:
    """Return `code`. From now on, SIGTERM and SIGINT exit at once with it, so that a late signal does not change it."""
    if threading.current_thread() is threading.main_thread():  # Python handles signals in no other
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(code))
            # As Python shuts down, handlers become the default again, which kills. What is ignored stays ignored.
            atexit.register(signal.signal, number, signal.SIG_IGN)
    return code


def report(error: BaseException) -> int:
    """Print what went wrong and return the exit code for it.

    Prints nothing if the reader of our output has exited; the code is then that of a program ended by SIGPIPE."""
    if _has_no_reader(error):
        _silence()
        return _NO_READER
    if is_out_of_memory(error):
        error = RunFailed("out of memory; end other programs, or choose a smaller batch or model")
    if is_disk_full(error):
        _silence()
        error = RunFailed("the disk is full, or your quota on it; free some space and start again")
    if isinstance(error, InputError | RunFailed):
        if is_first("error"):
            line = _BREAKS.sub(lambda found: ascii(found[0])[1:-1], as_named(error))  # which a file's name may hold
            text = f"{Path(sys.argv[0]).name}: error: {line}"
            try:
                print(text, file=sys.stderr, flush=True)
            except BrokenPipeError:
                _silence()
            _tell_torchrun(text)
        return 2 if isinstance(error, InputError) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    traceback.print_exception(error)
    return 1


def is_first(what: str) -> bool:
    """Tell whether this is the first of a run's processes on this host that asks this about `what`."""
    file: str | Path | None = os.environ.get(REPORT_ONCE)
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file and own and Path(own).parent.is_dir():
        file = Path(own).parents[1] / "gpt2xla-reported"  # all processes of this torchrun have their folders there
    try:
        if file:
            os.close(os.open(f"{file}-{what}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:  # the launcher has removed its folder already
        return True
    return True


def _has_no_reader(error: BaseException) -> bool:
    """Tell whether `error` comes from standard output or standard error. Other connections can break, too."""
    return isinstance(error, BrokenPipeError) and any(map(_is_broken, (sys.stdout, sys.stderr)))


def is_disk_full(error: BaseException) -> bool:
    """Tell whether a disk is full. It may be the one that standard output goes to."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _open_closed_streams() -> None:
    """Open closed standard streams (as `>&-` leaves them) on /dev/null.

    Otherwise the next files that the program opens would take their numbers, and receive what libraries print."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  it stays open


def _silence() -> None:
    """Redirect broken streams to /dev/null. Otherwise Python would try to flush them at exit and report the failure."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def _is_broken(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError, AttributeError):  # not a file of the operating system
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _tell_torchrun(text: str) -> None:
    """Have torchrun repeat the line at the end of its own report, which is longer than a screen."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reason = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": reason}), encoding="utf-8")
