"""Tells which of a run's processes has exited: a broken collective does not say."""

from __future__ import annotations

import os
import select
import socket

import torch.distributed as dist


class Peers:
    """Watches the other processes on this host. All processes of the default group create it together."""

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

    def ended(self) -> list[int]:
        """Return the ranks on this host that have exited in any way."""
        poll = select.poll()
        for watched in self._watched.values():
            poll.register(watched, select.POLLIN)
        ready = {number for number, event in poll.poll(0)}
        return [rank for rank, watched in self._watched.items() if watched in ready]
