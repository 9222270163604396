"""The processes of a run under torchrun: which this is, by torchrun's variables, how they meet, and which have exited."""

from __future__ import annotations

import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from gpt2xla.errors import InputError, RunFailed
from gpt2xla.logs.console import say
from gpt2xla.processes.exits import report
from gpt2xla.processes.quiet import silent
from gpt2xla.processes.signals import is_saving
from gpt2xla.runtime.leaving import exited_early

# Others wait while the main process saves; a large model on a slow disk takes its time.
COLLECTIVE_TIMEOUT = timedelta(hours=1)
MINUTES_TO_MEET = 10
SECONDS_OF_SILENCE = 10
SECONDS_OF_GRACE = 10  # after another process has exited; where Python runs, a run ends sooner, and says more

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_FIX = "start the processes with torchrun, which sets them all, or unset them for one process"
_left: list[dist.ProcessGroup | None] = []  # groups, kept as `leave` says


class Place(NamedTuple):
    """Where this process is among those of a run. `local_rank` is None if the launcher did not set it."""

    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Return this process's place, or None if it is alone. Raise InputError if variables are missing or contradictory."""
    numbers = {}
    for name in _NUMBERS:
        if text := environment.get(name):
            if not (text.isascii() and text.isdecimal()):
                raise InputError(f"{name}={text}: not a whole number; {_FIX}")
            numbers[name] = int(text)
    if "RANK" not in numbers:
        for name, alone in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
            if numbers.get(name, alone) != alone:
                raise InputError(f"{name}={numbers[name]} is set, but not RANK; {_FIX}")
        return None
    rank = numbers["RANK"]
    if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]:
        raise InputError(f"RANK={rank} is set, but not {', '.join(missing)}; {_FIX}")
    for name, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if name in numbers and size in numbers and numbers[name] >= numbers[size]:
            raise InputError(f"{name}={numbers[name]}, with {size}={numbers[size]}: ranks count from 0; {_FIX}")
    if not 0 < numbers["MASTER_PORT"] < 2**16:
        raise InputError(f"MASTER_PORT={numbers['MASTER_PORT']}: choose a port from 1 to 65535")
    return Place(rank, numbers["WORLD_SIZE"], numbers.get("LOCAL_RANK"), numbers.get("LOCAL_WORLD_SIZE", 1))


def join(place: Place, backend: str, device: torch.device) -> None:
    """Make the default process group of all processes, each with its `device`. Waits of more than a moment are announced.

    Raises InputError if MASTER_PORT is taken or nobody answers at MASTER_ADDR, and RunFailed if others do not join."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    torchrun_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if place.rank == 0 and not torchrun_listens:
        _refuse_a_taken_port(port)
    else:
        _wait_for_first(place, host, port)
    with silent(1, 2) as say_still:
        store = _meet(partial(say_still, f"rank {place.rank}: waiting for the other processes at {host}:{port} ..."))
        if store is None:
            raise RunFailed(
                f"rank {place.rank}: the {place.world_size} processes have not all met at MASTER_ADDR={host} "
                f"MASTER_PORT={port} within {MINUTES_TO_MEET} minutes; read the others' messages, and check whether another "
                "program listens there"
            )
        store.set_timeout(COLLECTIVE_TIMEOUT)
        store = dist.PrefixStore("default_pg", store)
        dist.init_process_group(
            backend,
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if backend == "nccl" else None,  # which NCCL would guess in a barrier; gloo takes none
        )


def leave() -> None:
    """Leave the default process group, but keep the object until the process ends.

    Otherwise DDP's reducer, its last owner, deletes it together with the model: it waits for the group's threads and holds
    Python's lock. A thread that still has the tensor of a collective needs that lock to delete it: both wait for ever."""
    _left.append(dist.group.WORLD)
    dist.destroy_process_group()


class Peers:
    """Tells which of the others on this host has exited: a broken collective does not say, and one of NCCL waits for ever.

    While it is open, no process may exit as long as the run is well. If one does and this process has not ended some seconds
    later, because its main thread waits in a call of C that Python cannot interrupt, a thread ends it.

    All processes of the default group create it together."""

    def __init__(self) -> None:
        places: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(places, (socket.gethostname(), os.getpid()))
        host = places[dist.get_rank()][0]
        self._watched: dict[int, int] = {}
        if hasattr(os, "pidfd_open"):  # only on Linux; unlike a pid, a pidfd never comes to mean another process
            for rank, (where, process) in enumerate(places):
                if where == host and rank != dist.get_rank():
                    try:
                        self._watched[rank] = os.pidfd_open(process)
                    except OSError:  # perhaps it is in another container
                        continue
        self._closed = threading.Event()
        if self._watched:
            threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def close(self) -> None:
        """Let all processes exit. Collective: the run is complete only when all get here."""
        dist.barrier()
        self._closed.set()

    def _watch(self) -> None:
        self._poll(None)
        while not self._closed.wait(SECONDS_OF_GRACE):
            if not is_saving():
                os._exit(report(exited_early(self.ended())))

    def ended(self) -> list[int]:
        """Return the ranks on this host that have exited in any way."""
        return self._poll(0)

    def _poll(self, timeout: float | None) -> list[int]:
        """Return what `ended` does, once there is one or the time, in milliseconds, is over."""
        poll = select.poll()
        for watched in self._watched.values():
            poll.register(watched, select.POLLIN)
        ready = {number for number, event in poll.poll(timeout)}
        return [rank for rank, watched in self._watched.items() if watched in ready]


def _meet(announce: Callable[[], object]) -> Any:
    """Return the store through which all processes know each other, or None if they do not meet.

    It is opened in a thread: torch has no time limit for a program that takes the connection and does not answer. Signals
    are handled meanwhile."""
    met: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def meet() -> None:
        try:
            met.put(next(dist.rendezvous("env://", timeout=timedelta(minutes=MINUTES_TO_MEET)))[0])
        except RuntimeError:
            met.put(None)

    threading.Thread(target=meet, name="rendezvous", daemon=True).start()
    try:
        return met.get(timeout=SECONDS_OF_SILENCE)
    except queue.Empty:
        announce()
    try:
        return met.get(timeout=60 * MINUTES_TO_MEET)
    except queue.Empty:
        return None


def _refuse_a_taken_port(port: int) -> None:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise InputError(
            f"MASTER_PORT={port}: {os.strerror(error.errno or 0).lower()}; choose another port for all processes"
        ) from None


def _wait_for_first(place: Place, host: str, port: int) -> None:
    start, is_announced = time.monotonic(), False
    while True:
        try:
            return socket.create_connection((host, port), timeout=5).close()
        except socket.gaierror:
            why = "no host of that name is known"
        except OSError as error:
            why = (error.strerror or "no answer").lower()
        waited = time.monotonic() - start
        if waited > 60 * MINUTES_TO_MEET:
            raise InputError(
                f"MASTER_ADDR={host} MASTER_PORT={port}: rank 0 has not answered for {MINUTES_TO_MEET} minutes ({why}); "
                "correct them, or start rank 0"
            )
        if waited > SECONDS_OF_SILENCE and not is_announced:
            say(f"rank {place.rank}: waiting for rank 0 at {host}:{port} ({why}) ...", error=True)
            is_announced = True
        time.sleep(min(1, 60 * MINUTES_TO_MEET))
