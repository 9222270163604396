"""Work done by several processes: its order, its errors, and that it ends with the first process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from gpt2xla.errors import InputError, RunFailed
from gpt2xla.processes.workers import in_order


def work(number: int) -> tuple[int, int]:
    if number == 50:
        raise InputError("50 is wrong")
    if number == 60:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number, os.getpid()


def test_results_come_in_order_and_few_pieces_are_held() -> None:
    asked = []

    def pieces() -> Iterator[tuple[int]]:
        for number in range(40):
            asked.append(number)
            yield (number,)

    found = []
    for square, process in in_order(work, pieces(), 2):
        assert len(asked) <= len(found) + 6
        found.append((square, process))
    assert [square for square, _ in found] == [number * number for number in range(40)]
    assert os.getpid() not in {process for _, process in found}
    assert [*in_order(work, [(3,), (4,)], 1)] == [(9, os.getpid()), (16, os.getpid())]


def test_an_error_or_a_killed_worker_ends_all() -> None:
    with pytest.raises(InputError, match="50 is wrong"):
        [*in_order(work, [(1,), (50,), (2,)], 2)]
    with pytest.raises(RunFailed, match="choose a smaller --num-workers"):
        [*in_order(work, [(1,), (60,), (2,)], 1 + 1)]
