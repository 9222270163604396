"""The store behind `gs://`: gcp-storage-emulator's, called in this process. What it lacks is added here: objects that are
created only if absent, content that is not text in multipart uploads, uploads that are given up, and the refusal of a range
beyond an object's end."""

from __future__ import annotations

import base64
import contextlib
import datetime
import io
import json
import logging
import re
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.server import Router
from gcp_storage_emulator.storage import Storage

from .store import Answer, Clock, Object

_GIVEN_UP = 499
_START_BYTES = 4096


class GCS:
    """One bucket."""

    expired_status = 401

    def __init__(self, bucket: str, clock: Clock) -> None:
        logging.disable(logging.ERROR)  # it logs an error for each object that is not there
        self._clock = clock
        objects.datetime = SimpleNamespace(now=lambda zone: clock.now())
        self._storage = Storage(use_memory_fs=True)
        buckets.create_bucket(bucket, self._storage)
        self._storage.buckets[bucket]["softDeletePolicy"]["retentionDurationSeconds"] = "0"
        self._name = bucket

    def key(self, path: str, query: str, start: bytes) -> str:
        name = re.search(r"/o/(.+)$", path)
        asked = parse_qs(query)
        if asked.get("uploadType") == ["multipart"]:
            named = re.search(rb'"name": *("[^"]*")', start)
            return json.loads(named[1]) if named else ""
        return unquote(name[1]) if name else asked.get("name", asked.get("prefix", [""]))[0]

    def answer(self, method: str, path: str, query: str, headers: Any, body: bytes) -> Answer:
        asked = parse_qs(query)
        key = self.key(path, query, body[:_START_BYTES])
        if asked.get("uploadType") == ["multipart"]:
            body = _in_base64(body, headers["Content-Type"])
        if "ifGenerationMatch" in asked:
            generation = self._object(key).get("generation", "0")
            if asked["ifGenerationMatch"] != [generation]:
                return self.error(412)
        if method == "DELETE" and "upload_id" in asked:
            self._storage.delete_resumable_file_obj(asked["upload_id"][0])
            return Answer(_GIVEN_UP, [], b"")
        before = self._object(key)
        first = re.match(r"bytes=(\d+)", headers.get("Range") or "")
        if first and int(first[1]) >= int(before.get("size", 0)) > 0:
            return Answer(416, [], b"InvalidRange: The requested range cannot be satisfied.")
        answer = self._asked(method, f"{path}?{query}" if query else path, headers, body)
        if "upload_id" in asked and (now := self._object(key)) is not before:
            now["updated"] = now["timeCreated"] = self._clock.now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return answer

    def _object(self, key: str) -> dict[str, Any]:
        return self._storage.objects.get(self._name, {}).get(key, {})

    def _asked(self, method: str, target: str, headers: Any, body: bytes) -> Answer:
        got: list[tuple[str, str]] = []
        out, status = io.BytesIO(), [HTTPStatus.OK.value]
        headers = {name.lower(): value for name, value in headers.items()} | {"content-length": str(len(body))}
        given = SimpleNamespace(get=lambda name, default=None: headers.get(name.lower(), default))
        handler = SimpleNamespace(
            path=target, headers=given, server=SimpleNamespace(server_address=("127.0.0.1", 80)), storage=self._storage,
            rfile=io.BytesIO(body), wfile=out, send_response=lambda number, phrase: status.append(number),
            send_header=lambda name, value: got.append((name, value)), end_headers=lambda: None,
        )  # fmt: skip
        Router(handler).handle(method)
        return Answer(status[-1], got, out.getvalue())

    def error(self, status: int) -> Answer:
        message = "Invalid Credentials" if status == self.expired_status else "a fault of the test"
        text = json.dumps({"error": {"code": status, "message": message}})
        return Answer(status, [("Content-Type", "application/json")], text.encode())

    def is_list(self, method: str, path: str) -> bool:
        return method == "GET" and path.endswith(f"/b/{self._name}/o")

    def without(self, answer: Answer, hidden: set[str]) -> Answer:
        listed = json.loads(answer.body)
        listed["items"] = [item for item in listed["items"] if item["name"] not in hidden]
        return answer._replace(body=json.dumps(listed).encode())

    def objects(self) -> dict[str, Object]:
        found = self._storage.objects.get(self._name, {})
        return {
            name: Object(int(fields["size"]), datetime.datetime.fromisoformat(fields["updated"].replace("Z", "+00:00")))
            for name, fields in found.items()
        }

    def read(self, name: str) -> bytes:
        return self._storage.get_file(self._name, name)

    def remove(self, name: str) -> None:
        with contextlib.suppress(NotFound):
            self._storage.delete_file(self._name, name)


def _in_base64(body: bytes, content_type: str) -> bytes:
    """Return a multipart upload with its content as text: the emulator reads it with Python's parser of mails."""
    match = re.search(r'boundary="?([^";]+)"?', content_type)
    assert match, content_type
    border = b"--" + match[1].encode()
    _, meta, rest = body.split(border, 2)
    content = rest[: rest.rindex(border)]
    content = content.removesuffix(b"\n").removesuffix(b"\r") if b"\r\n\r\n" in content[:200] else content[:-1]
    kind, content = re.split(rb"\r?\n\r?\n", content, maxsplit=1)
    text = kind + b"\nContent-Transfer-Encoding: base64\n\n" + base64.encodebytes(content) + b"\n"
    return border + meta + border + text + border + b"--"
