"""When a run will end: the pace of its newest updates, and what the evaluations between them take."""

from __future__ import annotations

import bisect
import datetime
from collections.abc import Callable, Mapping

from gpt2xla.logs.throughput import Throughput

_STEPS_BEFORE_IT_IS_SAID = 10  # or a minute of them
_SECONDS_BEFORE_IT_IS_SAID = 60.0
_FEWEST_STEPS = 20  # a shorter run ends before its end was worth a line


class TimeLeft:
    """Estimates the seconds to the end of a run.

    Args:
        tokens: returns how many tokens the run has read after a step.
        throughput: its pace is the speed that the console shows, so that speed and time left agree.
        intervals: of each evaluation, in updates.
        validation: what one validation costs, in tokens of updates, until one was measured."""

    def __init__(
        self,
        first_step: int,
        last_step: int,
        tokens: Callable[[int], int],
        throughput: Throughput,
        intervals: Mapping[str, int],
        validation: float,
    ) -> None:
        self._first = self._step = first_step
        self._last, self._tokens, self._throughput, self._intervals = last_step, tokens, throughput, intervals
        self._is_said = False
        self._guessed, self._evaluations = validation, dict[str, float]()

    def step(self, step: int) -> None:
        """Note that update `step` is done."""
        self._step = step

    def evaluation(self, name: str, seconds: float) -> None:
        self._evaluations[name] = seconds

    def seconds(self) -> float | None:
        """Return how long the rest takes; None before two updates are done."""
        if (pace := self._throughput.seconds_per_token) is None:
            return None
        known = {"valid_loss": self._guessed * pace} | self._evaluations
        return self._tokens_left * pace + sum(
            known.get(name, 0.0) * self._times_due(interval) for name, interval in self._intervals.items()
        )

    def expected_end(self, seconds_to_limit: float, now: datetime.datetime) -> str:
        """Return the sentence about the expected end, once: after the tenth update that counts, or earlier if updates are
        slow. Return "" otherwise."""
        left, steps, newest = self.seconds(), self._last - self._step, self._throughput
        is_time = newest.updates >= _STEPS_BEFORE_IT_IS_SAID or newest.seconds >= _SECONDS_BEFORE_IT_IS_SAID
        if left is None or not steps or self._is_said or not is_time or self._last - self._first < _FEWEST_STEPS:
            return ""
        assert newest.seconds_per_token
        self._is_said = True
        pace = f"{_short(self._tokens_left / steps * newest.seconds_per_token)} per step"
        if seconds_to_limit < left:
            read = self._tokens(self._step) + self._tokens_left * seconds_to_limit / left
            step = bisect.bisect_right(range(self._last), read, key=self._tokens) - 1
            reached = f"after about step {step} of {self._last}"
            return f"expected to stop at the time limit {_when(seconds_to_limit, now)}, {reached} ({pace})"
        return f"expected to end {_when(left, now)} ({pace})"

    @property
    def _tokens_left(self) -> int:
        return self._tokens(self._last) - self._tokens(self._step)

    def _times_due(self, interval: int) -> int:
        if not interval:
            return int(self._step < self._last)
        times = self._last // interval - self._step // interval
        return times + int(self._last % interval > 0 and self._step < self._last)


def in_words(seconds: float) -> str:
    """Return "2 h 39 min", "12 min", "1 d 3 h" or "45 s"."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _when(seconds: float, now: datetime.datetime) -> str:
    end = now + datetime.timedelta(seconds=seconds)
    day = "" if end.date() == now.date() else end.strftime("%a %d %b, ")
    return f"in {in_words(seconds)}, at {day}{end:%H:%M}"


def _short(seconds: float) -> str:
    if seconds >= 100:
        return in_words(seconds)
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
