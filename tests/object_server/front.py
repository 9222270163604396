"""Takes the connections of a store: does the faults that are due, counts requests, and answers the test under `/-/`."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from . import faults
from .store import Answer, Clock, Store

_BLOCK_BYTES = 1 << 18
_CONTROL = "/-/"


class _Ended(Exception):
    """The connection ends without an answer."""


class Front(ThreadingHTTPServer):
    """The server of one store. Requests are carried out one after another, as if at one moment each."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, store: Store, clock: Clock) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store, self.clock, self.faults = store, clock, faults.Faults()
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.is_expired, self.lists_late = False, 0.0  # seconds after which lists show a new object
        self.first_seen: dict[str, float] = {}

    def carry_out(self, method: str, path: str, query: str, headers: Any, body: bytes) -> Answer:
        with self.lock:
            answer = self.store.answer(method, path, query, headers, body)
            now, names = time.monotonic(), self.store.objects()
            self.first_seen = {name: self.first_seen.get(name, now) for name in names}
            if self.lists_late and answer.status == 200 and self.store.is_list(method, path):
                late = {name for name, seen in self.first_seen.items() if now - seen < self.lists_late}
                answer = self.store.without(answer, late)
        return answer

    def handle_error(self, request: Any, address: Any) -> None:
        """Print what is a fault of this server: clients that are killed leave connections behind."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, address)


class _Handler(BaseHTTPRequestHandler):
    server: Front
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def _handle(self) -> None:
        path, _, query = self.path.partition("?")
        if path.startswith(_CONTROL):
            self._control(path.removeprefix(_CONTROL))
            return
        start = self.rfile.peek() if int(self.headers.get("Content-Length") or 0) else b""  # type: ignore[attr-defined]
        key = self.server.store.key(path, query, start)
        fault = self.server.faults.due(self.command, key) or faults.NO_FAULT
        line: dict[str, Any] = {"method": self.command, "key": key, "query": query, "status": None}
        line["fault"] = fault.kind or None
        self.server.requests.append(line)
        try:
            answer = self._answer(fault, path, query)
            line["status"] = answer.status
            self._send(answer, fault)
        except _Ended:
            self._end()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _handle

    def _answer(self, fault: faults.Fault, path: str, query: str) -> Answer:
        if fault.kind == faults.KILL_BEFORE:
            self._kill(fault)
        body = self._body(fault)
        if fault.kind == faults.WAIT:
            time.sleep(fault.value)
        if self.server.is_expired:
            return self.server.store.error(self.server.store.expired_status)
        if fault.kind == faults.STATUS:
            return self.server.store.error(int(fault.value))
        answer = self.server.carry_out(self.command, path, query, self.headers, body)
        if fault.kind == faults.KILL_AFTER:
            self._kill(fault)
        if fault.kind == faults.LOST:
            raise _Ended
        return answer

    def _body(self, fault: faults.Fault) -> bytes:
        size = int(self.headers.get("Content-Length") or 0)
        is_cut = fault.kind == faults.CUT and size > 0
        left, blocks = size // 2 if is_cut else size, []
        while left:
            block = self.rfile.read(min(left, self._block(fault)))
            if not block:  # the client is gone
                raise _Ended
            self._wait(fault, len(block))
            blocks.append(block)
            left -= len(block)
        if is_cut:
            raise _Ended
        return b"".join(blocks)

    def _send(self, answer: Answer, fault: faults.Fault = faults.NO_FAULT) -> None:
        self.send_response_only(answer.status)
        self.send_header("Date", email.utils.format_datetime(self.server.clock.now(), usegmt=True))
        has_size = False
        for name, value in answer.headers:
            if name.lower() in ("date", "connection", "transfer-encoding"):
                continue
            if name.lower() == "content-length":
                has_size = self.command == "HEAD"  # that of the object
                if not has_size:
                    continue
            self.send_header(name, value)
        body = b"" if self.command == "HEAD" else answer.body
        if not has_size:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        is_cut = fault.kind == faults.CUT
        body = body[: len(body) // 2] if is_cut else body
        step = self._block(fault)
        for start in range(0, len(body), step):
            block = body[start : start + step]
            self._wait(fault, len(block))
            self.wfile.write(block)
            self.wfile.flush()
        self.wfile.flush()
        if is_cut:
            raise _Ended

    def _block(self, fault: faults.Fault) -> int:
        """Return how much is read or written at a time: of a slow connection, a tenth of a second's worth."""
        return max(1, int(fault.value / 10)) if fault.kind == faults.SLOW else _BLOCK_BYTES

    def _wait(self, fault: faults.Fault, size: int) -> None:
        if fault.kind == faults.SLOW:
            time.sleep(size / fault.value)

    def _kill(self, fault: faults.Fault) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(fault.value), signal.SIGKILL)
        raise _Ended

    def _end(self) -> None:
        self.close_connection = True
        # Data that nobody has read, and no waiting for it: the client sees "connection reset".
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def handle_expect_100(self) -> bool:
        expected = super().handle_expect_100()
        self.wfile.flush()
        return expected

    def _control(self, name: str) -> None:
        """Answer the test."""
        server, sent = self.server, json.loads(self._body(faults.NO_FAULT) or b"{}")
        result: Any = {}
        if name == "faults":
            if self.command == "POST":
                server.faults.add(**sent)
            elif self.command == "DELETE":
                server.faults.clear(sent.get("key", ""))
            result = server.faults.left()
        elif name == "settings":
            server.is_expired = sent.get("expired", server.is_expired)
            server.lists_late = sent.get("lists_late", server.lists_late)
            server.clock.skew = sent.get("skew", server.clock.skew)
        elif name == "requests":
            result = list(server.requests)
        elif name == "objects":
            with server.lock:
                result = {key: (size, when.timestamp()) for key, (size, when) in server.store.objects().items()}
        elif name.startswith("objects/"):
            key = unquote(name.removeprefix("objects/"))
            with server.lock:
                if self.command == "DELETE":
                    server.store.remove(key)
                result = base64.b64encode(server.store.read(key)).decode() if key in server.store.objects() else None
        self._send(Answer(200, [("Content-Type", "application/json")], json.dumps(result).encode()))

    def log_message(self, *_: Any) -> None:
        pass
