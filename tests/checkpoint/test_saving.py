"""Background saves run one at a time, are awaited, and report failures."""

from __future__ import annotations

import threading

import pytest

from gpt2xla.checkpoint.saver import BackgroundSaves


def test_the_caller_continues_and_the_next_save_waits_for_the_one_before() -> None:
    saves = BackgroundSaves(lambda error: None)
    may_end, order = threading.Event(), []

    def slow() -> None:
        may_end.wait(10)
        order.append("slow")

    saves.start(slow)
    assert order == []
    threading.Timer(0.05, may_end.set).start()
    saves.start(lambda: order.append("quick"))
    assert order[0] == "slow"
    assert saves.wait()
    assert order == ["slow", "quick"]


def test_a_save_that_cannot_be_written_is_reported_and_the_next_may_succeed() -> None:
    reported: list[OSError] = []
    saves = BackgroundSaves(reported.append)

    def full() -> None:
        raise OSError("disk full")

    saves.start(full)
    assert not saves.wait()
    assert [str(error) for error in reported] == ["disk full"]
    saves.start(lambda: None)
    assert saves.wait()


def test_our_own_errors_are_not_swallowed() -> None:
    saves = BackgroundSaves(lambda error: None)
    saves.start(lambda: [][0])
    with pytest.raises(IndexError):
        saves.wait()
