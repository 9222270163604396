"""A stand-in for the Hugging Face hub with one data set or model, on this machine, which misbehaves on request.

It takes files, too, from those who have the right token: small ones in the commit, large ones by git LFS.

It answers what `datasets` and `huggingface_hub` ask before they read files: repository, tree, paths, files by ranges.
Large files lie on another host, as the hub's do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_tests"
LARGE = (".parquet", ".gz", ".safetensors")
CUT = "cut"  # half of what is promised
CLOSED = "closed"  # no answer
SLOW = "slow"  # ten seconds' pause in the middle of the body


class Request(NamedTuple):
    method: str
    path: str
    range: str
    status: int
    sent: int


class Hub(ThreadingHTTPServer):
    """Faults are taken from `faults[method, end of path]`, one a request: status, (status, headers), CUT, CLOSED, SLOW."""

    daemon_threads = True

    def __init__(self, name: str, files: dict[str, bytes], kind: str = "datasets") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.files = name, files
        self.api = f"/api/{kind}/{name}"
        self.pages = f"/{name}" if kind == "models" else f"/{kind}/{name}"
        self.commit = _hash("first commit")
        self.branches: dict[str, dict[str, bytes]] = {"main": files}
        self.large: dict[str, bytes] = {}  # uploaded by LFS, by SHA-256
        self.visibility = ""  # of the repository, once it is made; "" if it was there
        self.faults: dict[tuple[str, str], Iterator[Any]] = {}
        self.requests: list[Request] = []
        self.paused, self.resumed = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def elsewhere(self) -> str:
        return f"http://localhost:{self.server_port}/elsewhere"

    def misbehave(self, method: str, path: str, faults: Iterable[Any]) -> None:
        self.faults[method, path] = iter(faults)

    def behave(self) -> None:
        self.faults.clear()
        self.requests.clear()
        self.paused, self.resumed = threading.Event(), threading.Event()

    def sent(self, path: str) -> int:
        """Bytes of a file that went over the wire."""
        return sum(request.sent for request in self.requests if request.path.endswith(path))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        hub, repository = self.server, self.server.api
        if self._is_faulty(path):
            return
        if path.startswith(f"{hub.pages}/resolve/"):
            branch, _, name = path.partition("/resolve/")[2].partition("/")
            self._file(name, hub.branches.get(branch, hub.files))
        elif path.startswith("/elsewhere/"):
            self._body(hub.files[path.removeprefix("/elsewhere/")], {"ETag": '"elsewhere"'})
        elif path in (repository, f"{repository}/revision/main", f"{repository}/revision/{hub.commit}"):
            self._json({"id": hub.name, "sha": hub.commit, "siblings": [{"rfilename": name} for name in hub.files]})
        elif path.startswith(f"{repository}/tree/"):
            folder = path.removeprefix(f"{repository}/tree/").partition("/")[2]
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["False"])[0].lower() == "true"
            entries = self._tree(folder, recursive)
            self._json(entries) if entries or not folder else self._error(404, "EntryNotFound")
        else:
            self._error(404 if path.startswith("/api/") else 401, "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = self._asked().decode()
        path = unquote(urlsplit(self.path).path)
        if self._is_faulty(path):
            return
        what, _, branch = path.removeprefix(self.server.api).removeprefix("/").partition("/")
        if what in ("preupload", "commit", "branch") or path.endswith(("/api/repos/create", "/objects/batch")):
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                self._take(what if path.startswith(self.server.api) else path, branch, asked)
            else:
                self._error(401)
            return
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
            return
        assert path == f"{self.server.api}/paths-info/{self.server.commit}", path
        names = json.loads(asked)["paths"] if asked.startswith("{") else parse_qs(asked)["paths"]
        self._json([self._entry(name) for name in names if name in self.server.files])

    def do_PUT(self) -> None:
        content = self._asked()
        if not self._is_faulty(self.path):
            self.server.large[hashlib.sha256(content).hexdigest()] = content
            self._answer(200, b"", {"ETag": '"uploaded"'})

    def _asked(self) -> bytes:
        """Return the body of the request, which may come in chunks."""
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _take(self, what: str, branch: str, asked: str) -> None:
        """Answer one of the requests of which an upload consists."""
        hub = self.server
        if what == "/api/repos/create":
            values = json.loads(asked)
            full = f"{values.get('organization') or 'me'}/{values['name']}"
            if full.split("/")[0] != hub.name.split("/")[0]:
                self._error(403)
            elif hub.visibility or hub.files:
                self._answer(
                    409, json.dumps({"url": f"{hub.url}/{full}"}).encode(), {"Content-Type": "application/json"}
                )
            else:
                hub.visibility = values.get("visibility") or ("private" if values.get("private") else "public")
                self._json({"url": f"{hub.url}/{full}"})
        elif what == "preupload":
            modes = {f["path"]: "lfs" if f["path"].endswith(LARGE) else "regular" for f in json.loads(asked)["files"]}
            found = hub.branches[branch]
            oids = {path: _blob(found[path]) for path in modes if path in found and modes[path] == "regular"}
            answers = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oids.get(path)}
                for path, mode in modes.items()
            ]
            self._json({"files": answers})
        elif what.endswith("/objects/batch"):
            wanted = json.loads(asked)["objects"]
            place = {"actions": {"upload": {"href": f"{hub.elsewhere}/upload"}}}
            self._json({"objects": [one | ({} if one["oid"] in hub.large else place) for one in wanted]})
        elif what == "branch":
            status = 409 if branch in hub.branches else 200
            hub.branches.setdefault(branch, dict(hub.files))
            self._answer(status, b"{}", {"Content-Type": "application/json"})
        else:
            self._commit(branch, [json.loads(line) for line in asked.splitlines()])

    def _commit(self, branch: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.branches[branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        commit = _hash(json.dumps(lines))
        self._json({"commitOid": commit, "commitUrl": f"{self.server.url}/{self.server.name}/commit/{commit}"})

    def log_message(self, *arguments: Any) -> None:
        pass

    def _is_faulty(self, path: str) -> bool:
        self.cut = self.slow = False
        faults = [
            iter_
            for (method, end), iter_ in self.server.faults.items()
            if method == self.command and path.endswith(end)
        ]
        fault = next(faults[0], None) if faults else None
        self.cut, self.slow = fault == CUT, fault == SLOW
        if fault is None or self.cut or self.slow:
            return False
        if fault == CLOSED:
            self._log(0, 0)
            self.close_connection = True
        else:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self._error(status, headers=headers)
        return True

    def _file(self, name: str, files: dict[str, bytes]) -> None:
        hub = self.server
        if name not in files:
            self._error(404, "EntryNotFound")
        elif name.endswith(LARGE):
            etag, size = hashlib.sha256(files[name]).hexdigest(), len(files[name])
            linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(size), "X-Repo-Commit": hub.commit}
            self._answer(302, b"", linked | {"Location": f"{hub.elsewhere}/{name}"})
        else:
            self._body(files[name], {"ETag": f'"{_hash(files[name])}"', "X-Repo-Commit": hub.commit})

    def _body(self, content: bytes, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range", "")
        if not wanted:
            self._answer(200, content, headers | {"Accept-Ranges": "bytes"})
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        end = int(last) + 1 if last else len(content)
        span = {"Content-Range": f"bytes {first}-{end - 1}/{len(content)}"}
        self._answer(206, content[int(first) : end], headers | span)

    def _tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        for name in sorted(self.server.files):
            parents = [str(parent) for parent in PurePosixPath(name).parents][-2::-1]
            for path in [*parents, name]:
                inside = path.removeprefix(folder + "/") if folder else path
                if (folder and inside == path) or ("/" in inside and not recursive):
                    continue
                is_file = path == name
                entries[path] = (
                    self._entry(path) if is_file else {"type": "directory", "oid": _hash(path), "path": path, "size": 0}
                )
        return list(entries.values())

    def _entry(self, name: str) -> dict[str, Any]:
        content = self.server.files[name]
        entry: dict[str, Any] = {"type": "file", "oid": _hash(content), "size": len(content), "path": name}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str = "", headers: dict[str, str] | None = None) -> None:
        self._answer(status, b"", ({"X-Error-Code": code} if code else {}) | (headers or {}))

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        body = b"" if self.command == "HEAD" else content
        if self.cut or self.slow:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if self.slow:
                resumed = self.server.resumed
                self.server.paused.set()
                time.sleep(10)
                resumed.set()
            body, self.close_connection = body[: len(body) // 2], True
        else:
            self.wfile.write(body)
        self._log(status, len(body))

    def _log(self, status: int, sent: int) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(Request(self.command, path, self.headers.get("Range", ""), status, sent))


def _blob(content: bytes) -> str:
    """Return git's name for a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _hash(content: str | bytes) -> str:
    return hashlib.sha1(content.encode() if isinstance(content, str) else content).hexdigest()
