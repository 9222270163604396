"""Which of a run's processes has ended: what a broken collective does not tell the others."""

from __future__ import annotations

import os
import select
import socket

import torch.distributed as dist


class Peers:
    """Watches the other processes on this host. Made by all processes of the default group together."""

    def __init__(self) -> None:
        places: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(places, (socket.gethostname(), os.getpid()))
        host = places[dist.get_rank()][0]
        self._watched: dict[int, int] = {}
        if hasattr(os, "pidfd_open"):  # Linux alone has them; unlike a number, they stay the same process for ever
            for rank, (where, process) in enumerate(places):
                if where == host and rank != dist.get_rank():
                    try:
                        self._watched[rank] = os.pidfd_open(process)
                    except OSError:  # in a container of its own, perhaps
                        continue

    def ended(self) -> list[int]:
        """Ranks on this host that have ended, in whatever way."""
        poll = select.poll()
        for watched in self._watched.values():
            poll.register(watched, select.POLLIN)
        ready = {number for number, event in poll.poll(0)}
        return [rank for rank, watched in self._watched.items() if watched in ready]
