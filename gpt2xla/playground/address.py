"""Where the page is served: a socket that is bound before anything slow is imported."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from gpt2xla.errors import InputError


@dataclass(frozen=True)
class Address:
    """A socket that listens on `host`, the page's URL, and whether only this machine can reach it."""

    socket: socket.socket
    url: str
    host: str
    is_local: bool


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[Address]:
    """Listen on `host` and `port`; port 0 takes a free one. Warns if others than this machine can reach it. Raises
    InputError if that is impossible."""
    try:
        [(family, _, _, _, place), *_] = socket.getaddrinfo(host or "-", port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise InputError(f"--host {host}: no such address here; leave it out, or write 0.0.0.0 for all") from None
    with contextlib.closing(socket.socket(family)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(place)
            listening.listen()
        except OSError as error:
            flag = f"--host {host}" if isinstance(error, socket.gaierror) or error.errno == 99 else f"--port {port}"
            raise InputError(f"{flag}: {error.strerror}; choose another") from None
        found = listening.getsockname()
        ip = ipaddress.ip_address(found[0])
        if not ip.is_loopback:
            print(f"warning: --host {host}: everyone on the network can use the page and its models", file=sys.stderr)
        name = "localhost" if ip.is_unspecified else f"[{ip}]" if ip.version == 6 else ip
        yield Address(listening, f"http://{name}:{found[1]}/", host, ip.is_loopback)
