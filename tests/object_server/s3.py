"""The store behind `s3://`: moto's, called in this process."""

from __future__ import annotations

import datetime
import html
import io
import re
import sys
from typing import Any
from urllib.parse import parse_qs, unquote

import moto.s3.models
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.test import run_wsgi_app

from .store import Answer, Clock, Object

_ERRORS = {403: "ExpiredToken", 429: "TooManyRequests", 500: "InternalError", 503: "SlowDown"}


class S3:
    """One bucket."""

    expired_status = 403

    def __init__(self, bucket: str, clock: Clock) -> None:
        moto.s3.models.utcnow = clock
        self._app = DomainDispatcherApplication(create_backend_app)
        self._backend = backend = moto.s3.models.s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        backend.create_bucket(bucket, "us-east-1")
        self._bucket = backend.buckets[bucket]
        self._name = bucket

    def key(self, path: str, query: str, start: bytes) -> str:
        name = unquote(path).removeprefix(f"/{self._name}").lstrip("/")
        return name or parse_qs(query).get("prefix", [""])[0]

    def answer(self, method: str, path: str, query: str, headers: Any, body: bytes) -> Answer:
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": unquote(path, "latin-1"), "QUERY_STRING": query,
            "RAW_URI": f"{path}?{query}" if query else path, "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.version": (1, 0), "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body), "wsgi.errors": sys.stderr, "wsgi.multithread": True,
            "wsgi.multiprocess": False, "wsgi.run_once": False, "CONTENT_TYPE": headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
        }  # fmt: skip
        environ |= {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers.items()}
        parts, status, answered = run_wsgi_app(self._app, environ)
        return Answer(int(status.split()[0]), list(answered.items()), b"".join(parts))

    def error(self, status: int) -> Answer:
        code = _ERRORS.get(status, "InternalError")
        text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>a fault of the test</Message></Error>'
        return Answer(status, [("Content-Type", "application/xml")], text.encode())

    def without(self, answer: Answer, hidden: set[str]) -> Answer:
        def kept(match: re.Match[str]) -> str:
            name = re.search(r"<Key>(.*?)</Key>", match[0], re.DOTALL)
            return "" if name and unquote(html.unescape(name[1])) in hidden else match[0]

        text = re.sub(r"<Contents>.*?</Contents>", kept, answer.body.decode(), flags=re.DOTALL)
        return answer._replace(body=text.encode())

    def is_list(self, method: str, path: str) -> bool:
        return method == "GET" and path.strip("/") == self._name

    def objects(self) -> dict[str, Object]:
        return {name: Object(key.size, _aware(key.last_modified)) for name, key in self._bucket.keys.items()}

    def read(self, name: str) -> bytes:
        return self._bucket.keys[name].value

    def remove(self, name: str) -> None:
        self._backend.delete_object(self._name, name)


def _aware(when: datetime.datetime) -> datetime.datetime:
    return when if when.tzinfo else when.replace(tzinfo=datetime.timezone.utc)
