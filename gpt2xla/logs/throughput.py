"""How fast a run is: of each update, and of the newest ones together, from which all that is shown of speed and time left
follows."""

from __future__ import annotations

import time
from collections import deque

_NEWEST = 100  # updates, over which the pace is measured


class Throughput:
    """Measures updates from the times at which they finish: tokens per second, and model FLOPs utilisation (MFU).

    MFU is the share of the devices' peak rate that the model's own arithmetic uses (`GPT2.flops_per_token`).

    The pace is that of the newest updates: their tokens over their seconds, whatever the size of each. So it counts each
    second once, also where the results of several updates arrive together. The first update of a process or a size may have
    compiled, and does not count."""

    def __init__(self, flops_per_token: int, peak_flops: float | None) -> None:
        self._flops, self._peak = flops_per_token, peak_flops
        self._last = time.perf_counter()
        self._is_first = True
        self._newest: deque[tuple[int, float]] = deque(maxlen=_NEWEST)  # tokens and seconds of each

    def restart(self) -> float:
        """Leave out the time since the last step, which went into validating or saving, and return it, in seconds."""
        now = time.perf_counter()
        left_out, self._last = now - self._last, now
        return left_out

    def step(self, tokens: int, *, is_first: bool = False) -> dict[str, float | None]:
        """Note that an update of so many tokens is done, and return its own rate and MFU. `is_first` of its size."""
        seconds = max(self.restart(), 1e-9)
        if not (self._is_first or is_first):
            self._newest.append((tokens, seconds))
        self._is_first = False
        return self._numbers(tokens / seconds)

    def pace(self) -> dict[str, float | None]:
        """Return rate and MFU of the newest updates; nothing before two are done."""
        return self._numbers(1 / pace) if (pace := self.seconds_per_token) else {}

    @property
    def seconds_per_token(self) -> float | None:
        """Of the newest updates; None before two are done."""
        return self.seconds / sum(tokens for tokens, _ in self._newest) if self._newest else None

    @property
    def seconds(self) -> float:
        """What the newest updates took together."""
        return sum(seconds for _, seconds in self._newest)

    @property
    def updates(self) -> int:
        """How many updates are the newest ones."""
        return len(self._newest)

    def _numbers(self, rate: float) -> dict[str, float | None]:
        return {"tokens_per_second": rate, "mfu": self._flops * rate / self._peak if self._peak else None}
