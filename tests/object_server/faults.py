"""What goes wrong, and with which requests."""

from __future__ import annotations

import random
import threading
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

STATUS = "status"  # an error of HTTP, not carried out
CUT = "cut"  # the connection ends in the middle of the body: of the upload, which is not carried out, or of the answer
LOST = "lost"  # carried out, but the connection ends before the answer
SLOW = "slow"  # bodies in both directions take their time
WAIT = "wait"  # seconds before it is carried out
KILL_BEFORE = "kill before"  # SIGKILL of a process, not carried out
KILL_AFTER = "kill after"  # carried out, then SIGKILL of a process


@dataclass
class Fault:
    """A fault of requests that match.

    Attributes:
        kind: one of the constants above.
        value: the status, bytes per second, seconds, or process id.
        method: patterns of the methods, separated by `|`.
        key: a pattern of the object's name in the bucket, or of the prefix that is listed.
        skip: how many matching requests come through before.
        times: how many fail then; None: all.
        probability: of each.
        seed: of the draws.
    """

    kind: str
    value: float = 0
    method: str = "*"
    key: str = "*"
    skip: int = 0
    times: int | None = None
    probability: float = 1.0
    seed: int = 0
    _draw: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)

    def takes(self, method: str, key: str) -> bool:
        """Tell whether the fault is due in this request, and count it."""
        if not any(fnmatchcase(method, pattern) for pattern in self.method.split("|")) or not fnmatchcase(
            key, self.key
        ):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times == 0 or self._draw.random() >= self.probability:
            return False
        if self.times is not None:
            self.times -= 1
        return True


NO_FAULT = Fault("")


class Faults:
    """The faults that are set, in the order in which they were. A request has at most one."""

    def __init__(self) -> None:
        self._set: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, **fields: Any) -> None:
        with self._lock:
            self._set.append(Fault(**fields))

    def clear(self, key: str) -> None:
        with self._lock:
            self._set = [fault for fault in self._set if key not in ("", fault.key)]

    def due(self, method: str, key: str) -> Fault | None:
        with self._lock:
            return next((fault for fault in self._set if fault.takes(method, key)), None)

    def left(self) -> list[dict[str, Any]]:
        """Return those that may still happen."""
        with self._lock:
            return [
                {name: value for name, value in asdict(fault).items() if name != "_draw"}
                for fault in self._set
                if fault.times != 0
            ]
