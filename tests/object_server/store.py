"""What `front.py` and the stores share."""

from __future__ import annotations

import datetime
from typing import Any, NamedTuple, Protocol


class Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Object(NamedTuple):
    size: int
    modified: datetime.datetime


class Clock:
    """The server's clock, which may be wrong by `skew` seconds."""

    def __init__(self) -> None:
        self.skew = 0.0

    def now(self) -> datetime.datetime:
        return datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=self.skew)

    def __call__(self) -> datetime.datetime:
        """Return the time in UTC without saying so, as moto does."""
        return self.now().replace(tzinfo=None)


class Store(Protocol):
    """One bucket behind the HTTP of its kind."""

    expired_status: int  # what those get whose credentials have expired

    def key(self, path: str, query: str, start: bytes) -> str:
        """Return the name of the object that a request is about, or the prefix that it lists. `start` is of its body."""

    def answer(self, method: str, path: str, query: str, headers: Any, body: bytes) -> Answer: ...

    def error(self, status: int) -> Answer: ...

    def is_list(self, method: str, path: str) -> bool: ...

    def without(self, answer: Answer, hidden: set[str]) -> Answer:
        """Return the answer to a request for a list, without the objects that it does not show yet."""

    def objects(self) -> dict[str, Object]: ...

    def read(self, name: str) -> bytes: ...

    def remove(self, name: str) -> None: ...
