"""Counts faults: cases are spread over two processes, and each is checked separately."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_WORKERS = 2
_SHOWN = 5  # failures of one row that are printed; others are likely to be the same


@dataclass(frozen=True)
class Setting:
    """The setting of a scenario.

    Attributes:
        folder: an empty folder for the scenario alone.
        data: the flags that name the data.
        unbroken: undisturbed runs by the number of processes, with their data and options.
        seconds: how long the undisturbed run took, by the number of processes.
        full: all cases, or only some of each kind.
        seed: of all random draws.
    """

    folder: Path
    data: list[str]
    unbroken: dict[int, Path]
    seconds: dict[int, float]
    full: bool
    seed: int

    def cases(self, full: int, smoke: int) -> int:
        return full if self.full else smoke


@dataclass
class Row:
    """One line of the table: a fault, what has to hold after it, and how often it did."""

    fault: str
    bar: str
    passed: int = 0
    total: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, passed: bool, count: int = 1) -> None:
        self.passed += count if passed else 0
        self.total += count


def check_all(row: Row, cases: Iterable[T], check: Callable[[T], int | None]) -> Row:
    """Call `check(case)` for each case, in two processes at a time, and count. A case stands for as many faults as it
    returns (None: one). If it raises, it has failed."""
    cases = list(cases)
    begun = time.monotonic()
    queue, feed = os.pipe()
    answers, answer = os.pipe()
    os.set_blocking(feed, False)
    os.write(feed, b"".join(struct.pack("i", number) for number in range(len(cases))))
    os.close(feed)
    workers: list[int] = []
    shown = 0
    for _ in range(min(_WORKERS, len(cases))):
        sys.stdout.flush()
        sys.stderr.flush()
        if (pid := os.fork()) == 0:
            os.close(answers)
            _work(queue, answer, cases, check)
        workers.append(pid)
    os.close(queue)
    os.close(answer)
    try:
        with os.fdopen(answers) as stream:
            for text in stream:
                number, count, failure = json.loads(text)
                row.add(not failure, count)
                if failure:
                    shown += 1
                    if shown <= _SHOWN:
                        case = _in_words(cases[number])
                        print(f"    FAILED: {case}: {failure}", flush=True)
                        row.notes.append(f"failed: {case}: {failure.splitlines()[0]}")
    except BaseException:  # interrupted: the workers end the runs that they started
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        raise
    finally:
        for pid in workers:
            os.waitpid(pid, 0)
    row.seconds += time.monotonic() - begun
    return row


def _work(queue: int, answer: int, cases: list[T], check: Callable[[T], int | None]) -> NoReturn:
    """Check cases until none is left. However this process ends, the runs that it started are ended by their `with`."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        while taken := os.read(queue, 4):
            number = struct.unpack("i", taken)[0]
            os.write(answer, (json.dumps([number, *_outcome(check, cases[number])]) + "\n").encode())
    finally:
        os._exit(0)


def _in_words(case: Any) -> str:
    parts = case if isinstance(case, tuple) else (case,)
    return ", ".join(str(part) for part in parts if not callable(part) and not isinstance(part, Path))


def _outcome(check: Callable[[Any], int | None], case: Any) -> tuple[int, str]:
    try:
        return check(case) or 1, ""
    except AssertionError as error:
        return 1, str(error)[:1500] or traceback.format_exc()[-1500:]
    except Exception:
        return 1, traceback.format_exc()[-1500:]


def clear(folder: Path) -> None:
    """Delete the folder of a run that passed, and the records beside it."""
    for path in folder.parent.glob(f"{folder.name}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
