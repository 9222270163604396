"""A lock in an object store: one process at a time writes below a prefix, whichever machine it is on.

Stores have no locks, but can create an object only if there is none. Leases are numbered objects, `lease/00000001.json` and
so on. The newest one counts: who creates the next number has taken over. A holder renews its object, so that others see
that it lives; one that was not renewed for a minute has expired, by the storage's own clock. A holder that was only slow
finds the next number, and knows that it has lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2xla.errors import InputError
from gpt2xla.files import write_whole
from gpt2xla.storage import Bucket

RENEWED_EVERY, EXPIRES_AFTER = 15.0, 60.0  # seconds
_KEPT = 10  # of the newest: a store that lists late may show only older ones, from which the next numbers are tried
_NAME = re.compile(r"lease/(\d{8})\.json")
_PROBE = "lease/probe-"


class LeaseLost(OSError):
    """Another process has taken over."""


@dataclass(frozen=True)
class Standing:
    """The newest lease of a prefix, as it was found: number 0 if there is none."""

    number: int = 0
    holder: str = ""
    token: str = ""
    is_released: bool = True
    renewals: int = 0


class Lease:
    """A lease that this process holds. `held` makes it.

    Args:
        lost: called once, in a thread, with what has happened if another process takes over."""

    def __init__(self, bucket: Bucket, number: int, token: str, lost: Callable[[str], None]) -> None:
        self.bucket, self.number, self.token, self._lost = bucket, number, token, lost
        self._renewals, self._is_lost = 0, False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLost if another process has taken over, or OSError if that cannot be found out."""
        if self._is_lost or self.bucket.read(_name(self.number + 1)) is not None:
            taker = newest(self.bucket).holder or "another process"
            problem = f"{self.bucket.url} was taken over by {taker}, because this process did not answer for a while"
            if not self._is_lost:
                self._is_lost = True
                self._lost(problem)
            raise LeaseLost(problem)

    def release(self) -> None:
        """Stop renewing, and let the next process take over at once. Raises OSError if that cannot be written."""
        self._end.set()
        self._thread.join()
        if not self._is_lost:
            self.bucket.write(_name(self.number), _content(self.token, self._renewals, is_released=True))

    def _renew(self) -> None:
        while not self._end.wait(RENEWED_EVERY):
            with contextlib.suppress(OSError):  # the next time, or the next write, shows whether that lasts
                self.check()
                self._renewals += 1
                self.bucket.write(_name(self.number), _content(self.token, self._renewals))
            if self._is_lost:
                return


@contextlib.contextmanager
def held(
    bucket: Bucket,
    what: str,
    record: Path,
    say: Callable[[str], None],
    *,
    after: Standing | None = None,
    lost: Callable[[str], None] = lambda problem: None,
) -> Iterator[Lease]:
    """Hold the lease of a prefix.

    Args:
        what: the flag and the URL, with which messages begin.
        record: a file on this machine, which only this process writes now. A lease that it names is one of a process that
            has ended, and is taken over at once; after a machine was lost, that takes a minute.
        after: what `refuse_if_held` has returned, if something was read since then that another process may have changed.

    Raises InputError if another process holds it, or did so after `after`, and OSError if the storage cannot be used."""
    found = newest(bucket)
    if after is None:
        found = refuse_if_held(bucket, what, record, say)
    if after is not None and found.token != after.token:
        raise InputError(f"{what}: {found.holder} has written there since this run began; give the same command again")
    token, number = secrets.token_hex(8), found.number + 1
    write_whole(record, "\n".join((token, *_recorded(record)[:1])))
    if not bucket.create(_name(number), _content(token)):
        taker = newest(bucket).holder or "another process"
        raise InputError(f"{what}: {taker} has just begun there; wait for it, stop it, or choose another")
    write_whole(record, token)
    lease = Lease(bucket, number, token, lost)
    try:
        bucket.remove(path for path in bucket.files("lease") if _is_old(path, number))
        yield lease
    finally:
        with contextlib.suppress(OSError):  # it expires
            lease.release()


def newest(bucket: Bucket) -> Standing:
    """Return the newest lease. Raises OSError if the storage cannot be read."""
    number, standing = max(_numbers(bucket), default=0), Standing()
    while (content := bucket.read(_name(number or 1))) is not None:  # it may list the newest late
        number = number or 1
        standing, number = _read(number, content), number + 1
    return standing


def is_own(standing: Standing, record: Path) -> bool:
    """Whether the process that wrote `record` was the last to hold a lease."""
    return standing.number > 0 and standing.token in _recorded(record)


def refuse_if_held(bucket: Bucket, what: str, record: Path, say: Callable[[str], None]) -> Standing:
    """Return the newest lease, which nobody holds. The holder may have ended without releasing it: this waits until it has
    expired. Raises InputError if a process elsewhere renews it meanwhile."""
    found = newest(bucket)
    if not (found.is_released or is_own(found, record)):
        _wait_until_expired(bucket, found, what, say)
    return found


def _wait_until_expired(bucket: Bucket, found: Standing, what: str, say: Callable[[str], None]) -> None:
    """Raises InputError if its holder renews it meanwhile."""
    age, begun, is_said = _age(bucket, found) or 0.0, time.monotonic(), False
    while (left := EXPIRES_AFTER - age - (time.monotonic() - begun)) > 0:
        if not is_said:
            is_said = True
            say(f"{what}: waiting up to {left:.0f} s for a sign of life of {found.holder}, which has not released it")
        time.sleep(min(1.0, left))
        now = newest(bucket)
        if now.token == found.token and now.is_released:
            return
        if now != found:
            raise InputError(f"{what}: in use by {now.holder}; wait for it, stop it, or choose another")


def _age(bucket: Bucket, found: Standing) -> float | None:
    """Return the seconds since a lease was renewed, by the storage's clock; None if it does not tell times."""
    probe, now = f"{_PROBE}{secrets.token_hex(8)}", None
    renewed = bucket.modified(_name(found.number))
    if renewed is None:
        return None
    bucket.write(probe, b"")
    with contextlib.suppress(FileNotFoundError):  # cleared away by a process that has just begun
        now = bucket.modified(probe)
    bucket.remove([probe])
    return None if now is None else max(0.0, (now - renewed).total_seconds())


def _numbers(bucket: Bucket) -> list[int]:
    return [int(name[1]) for path in bucket.files("lease") if (name := _NAME.fullmatch(path))]


def _is_old(path: str, number: int) -> bool:
    """Whether the holder of lease `number` deletes an object: a lease long over, or what a killed process left."""
    name = _NAME.fullmatch(path)
    return path.startswith(_PROBE) or (name is not None and int(name[1]) <= number - _KEPT)


def _name(number: int) -> str:
    return f"lease/{number:08d}.json"


def _content(token: str, renewals: int = 0, *, is_released: bool = False) -> bytes:
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    values = {"holder": holder, "token": token, "renewals": renewals, "is_released": is_released}
    return json.dumps(values).encode() + b"\n"


def _read(number: int, content: bytes) -> Standing:
    try:
        values = json.loads(content)
        return Standing(
            number, values["holder"], values["token"], values["is_released"] is True, int(values["renewals"])
        )
    except (ValueError, KeyError, TypeError):  # not ours: nobody renews it
        return Standing(number, "an unknown program", "", is_released=False)


def _recorded(record: Path) -> list[str]:
    """Return the tokens of the leases that processes with this record took, the newest first."""
    with contextlib.suppress(OSError):
        return record.read_text(encoding="utf-8").split()
    return []
