"""Folders behind URLs: object stores (`gs://`, `s3://`, `hf://`) and whatever else fsspec knows.

A store's client raises its own errors, those of HTTP libraries, and OSErrors. From here on each is an OSError whose text is
one sentence; PermissionError where trying again is of no use.

The clients try again as well, each in its own way. Against a store that does not answer, their tries and ours would multiply
to half an hour. So `opened` leaves them few, and has them give up on a store that is silent for `SILENT_SECONDS`. A transfer
that moves may take as long as it needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import inspect
import logging
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from gpt2xla.errors import InputError, in_one_line
from gpt2xla.files import file_sha256, write_whole

T = TypeVar("T")

RETRY_WAITS = (1.0, 4.0, 15.0)  # seconds before each further try
SILENT_SECONDS = 20.0
PART_SECONDS = 300.0  # in which a part of an upload gets through: nine are on their way at once, so 4 Mbit/s suffice
_S3, _GCS, _HTTP = ("s3", "s3a"), ("gs", "gcs"), ("http", "https")
_FINAL = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError,
    NotImplementedError, TypeError,
)  # fmt: skip
_BLOCK_BYTES = 1 << 25  # each is a request of its own
# What an upload holds in memory: so many files at once, in parts of this size, of which s3fs sends several at once.
_FILES_AT_ONCE, _PART_BYTES, _PARTS_AT_ONCE = 3, 16 << 20, 3


for _client in ("gcsfs", "s3fs", "fsspec"):  # they print the tracebacks of errors that become sentences here
    logging.getLogger(_client).addHandler(logging.NullHandler())
LOGGER = logging.getLogger(__name__)  # its lines go to stderr


class Silence(Exception):
    """A store does not answer. It is none of the errors after which gcsfs tries again, as those of aiohttp and OSErrors."""


def opened(url: str, option: str, **settings: Any) -> tuple[Any, str]:
    """Return the file system of a URL, made with `settings`, and its path in it. Raises InputError if that is impossible.

    Time limits that the user has set in fsspec's configuration are used instead of the defaults."""
    try:
        protocol = url.partition("://")[0]
        files, path = fsspec.core.url_to_fs(url, **_limits(protocol), **settings)
        if protocol in _S3:
            files.retries = 1  # botocore, which it calls, has its own
        return files, path
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or getattr(error, "name", None) or "fsspec[full]"
        raise InputError(f"{option} {url} needs another package: pip install {package}") from None
    except Exception as error:  # each storage has its own errors, also for credentials
        if str(error).startswith("Protocol not known"):
            known = "gs://, s3://, hf:// or whatever else fsspec knows"
            raise InputError(f"{option} {url}: there is no {url.partition('://')[0]}://; write {known}") from None
        raise InputError(f"{option} {url} cannot be opened: {in_words(error)}") from None


def _limits(protocol: str) -> dict[str, Any]:
    """Return the settings with which a client gives up on a silent store, and leaves further tries to us."""
    known = next((names for names in (_S3, _GCS, _HTTP) if protocol in names), ())
    if known == _S3:
        # Twice, as all of a large file would have to be sent again because of one of its parts.
        waits = {"connect_timeout": SILENT_SECONDS, "read_timeout": SILENT_SECONDS}
        ours: dict[str, Any] = {"config_kwargs": waits | {"retries": {"total_max_attempts": 2}}}
    elif known:
        try:
            import aiohttp
        except ImportError:  # then the client is missing as well, which fsspec says
            return {}
        silent = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
        middlewares = {"middlewares": (_asked,)} if hasattr(aiohttp, "ClientMiddlewareType") else {}  # since 3.12
        of_gcs = {"requests_timeout": silent, "session_kwargs": middlewares}
        ours = of_gcs if known == _GCS else {"client_kwargs": {"timeout": silent}}
    else:
        return {}
    for users in (fsspec.config.conf.get(name, {}) for name in known):
        for setting in ours.keys() & users.keys():
            is_nested = isinstance(ours[setting], dict)
            ours[setting] = ours[setting] | users[setting] if is_nested else users[setting]
    return ours


async def _asked(request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
    """A middleware of aiohttp."""
    try:
        return await handler(request)
    except asyncio.TimeoutError as error:
        raise Silence(f"no answer within {SILENT_SECONDS:g} s") from error


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


def _is_known(files: Any) -> bool:
    """Whether it is a client of which is known how it sends and fetches."""
    return not {*_S3, *_GCS}.isdisjoint(_protocols(files))


def exists(url: str, option: str) -> bool:
    """Tell whether there is something at the URL, as far as its storage says. Raises InputError if it cannot be opened."""
    files, path = opened(url, option)
    return files.exists(path)


class Bucket:
    """A folder behind a URL, to read and to write. Names are relative to it, with `/` between folders.

    Every method tries again after errors of the network, and raises OSError in the end. After all tries at one have met
    silence, the next ones try only once, until the store answers. Methods may be called from several threads."""

    def __init__(self, url: str, option: str) -> None:
        """Open the URL that `option` names. Raises InputError if that is impossible; nothing is asked of the storage yet."""
        self.url, self.option = url.rstrip("/"), option
        # Others write here, too: what a list once said is no answer to whether something is there.
        self._files, self._path = opened(self.url, option, use_listings_cache=False)
        self._is_local = "file" in _protocols(self._files)
        self._is_silent = False

    def read(self, name: str) -> bytes | None:
        """Return what an object holds; None if there is none."""
        try:
            return self._tried("read", name, lambda: self._files.cat_file(self._at(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Make or replace an object. Readers find the old content or the new one."""
        self._tried("written", name, lambda: self._pipe(name, content))

    def create(self, name: str, content: bytes) -> bool:
        """Make an object unless there is one, and return whether it was made. On GCS and S3, of several that try at once
        one succeeds."""

        def create() -> bool:
            try:
                self._pipe(name, content, mode="create")
            except FileExistsError:
                return False
            except OSError:  # s3fs does not always tell what the refusal was
                self._files.invalidate_cache()
                if self._files.exists(self._at(name)):
                    return False
                raise
            return True

        # A try whose answer was lost may have succeeded.
        return self._tried("created", name, create) or self.read(name) == content

    def files(self, folder: str = "") -> dict[str, int]:
        """Return the objects below a folder, and their sizes in bytes. A store may list a new one late."""

        def find() -> dict[str, Any]:
            self._files.invalidate_cache()
            found: dict[str, Any] = self._files.find(self._at(folder), detail=True)
            return found

        start = len(self._files._strip_protocol(self._at("")).rstrip("/")) + 1
        try:
            found = self._tried("listed", folder, find)
        except FileNotFoundError:
            return {}
        return {path[start:]: info.get("size") or 0 for path, info in found.items() if info.get("type") != "directory"}

    def entries(self) -> dict[str, tuple[int, str]]:
        """Return size in bytes and version of each object directly in the folder, by name. A folder's name ends in `/`. If
        the URL is an object itself, its name here is "". A version changes with the content, as far as the store tells."""

        def found() -> list[dict[str, Any]]:
            self._files.invalidate_cache()
            info = self._files.info(self._path)
            return self._files.ls(self._path, detail=True) if info.get("type") == "directory" else [info | {"name": ""}]

        try:
            infos = self._tried("listed", "", found)
        except FileNotFoundError:
            return {}
        entries, own = {}, self._files._strip_protocol(self._at("")).rstrip("/")
        for info in infos:
            path, is_folder = info["name"].rstrip("/"), info.get("type") == "directory"
            if path != own:  # some stores keep an empty object for a folder
                version = "" if is_folder else version_of(self._files, path or self._path, info)
                entries[path.rpartition("/")[2] + "/" * is_folder] = (info.get("size") or 0, version)
        return entries

    def send(self, files: Mapping[str, Path]) -> None:
        """Copy local files to objects, several at once. At most 150 MB of them are in memory at a time."""

        def send(name: str, file: Path) -> None:
            self._tried("written", name, lambda: self._put(name, file))

        _at_once(send, files.items())

    def fetch(self, files: Mapping[str, Path]) -> dict[str, str]:
        """Copy objects to local files, several at once; folders are made. Return their SHA-256 by name. Raises
        FileNotFoundError if one is missing."""

        def fetch(name: str, file: Path) -> tuple[str, str]:
            file.parent.mkdir(parents=True, exist_ok=True)
            return name, self._tried("read", name, lambda: download(self._files, self._at(name), file))

        return dict(_at_once(fetch, files.items()))

    def remove(self, names: Iterable[str]) -> None:
        """Delete objects, one after another. Those that are not there do not matter."""

        def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._at(name))
            if self._is_local and "/" in name:
                with contextlib.suppress(OSError):  # there is more in the folder
                    os.rmdir(os.path.dirname(self._at(name)))

        for name in names:
            self._tried("deleted", name, lambda name=name: remove(name))  # type: ignore[misc]

    def modified(self, name: str) -> datetime.datetime | None:
        """Return when an object was written, by the storage's own clock; None if it does not tell."""

        def modified() -> datetime.datetime | None:
            self._files.invalidate_cache()
            try:
                when = self._files.modified(self._at(name))
            except (NotImplementedError, KeyError, AttributeError, TypeError):
                return None
            return when if isinstance(when, datetime.datetime) else None

        return self._tried("read", name, modified)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}".rstrip("/")

    def _pipe(self, name: str, content: bytes, mode: str = "overwrite") -> None:
        self._make_folder(name)
        if self._is_local and mode != "create":
            write_whole(Path(self._at(name)), content)
        else:
            settings = {"mode": mode} if mode == "create" else {}
            self._upload("pipe_file", len(content), self._at(name), content, **settings)

    def _put(self, name: str, file: Path) -> None:
        self._make_folder(name)
        # Parameters of s3fs and gcsfs, which others do not know.
        known = {"s3": {"chunksize": _PART_BYTES, "max_concurrency": _PARTS_AT_ONCE}, "gs": {"chunksize": _PART_BYTES}}
        settings = next((known[name] for name in _protocols(self._files) if name in known), {})
        self._upload("put_file", file.stat().st_size, str(file), self._at(name), **settings)

    def _upload(self, method: str, size: int, *arguments: Any, **settings: Any) -> None:
        """Call a method that sends `size` bytes. Clients do not notice a store that takes none, or does not ask for them."""
        if not _is_known(self._files):
            getattr(self._files, method)(*arguments, **settings)
            return
        moved = fsspec.Callback()
        if method == "put_file":
            settings["callback"] = moved
        upload = getattr(self._files, f"_{method}")(*arguments, **settings)
        seconds = SILENT_SECONDS + PART_SECONDS * min(size / _PART_BYTES, 1)
        fsspec.asyn.sync(self._files.loop, _while_it_moves, upload, moved, seconds)

    def _make_folder(self, name: str) -> None:
        if self._is_local:  # other storages have no folders
            self._files.makedirs(os.path.dirname(self._at(name)), exist_ok=True)

    def _tried(self, done: str, name: str, action: Callable[[], T]) -> T:
        waits = () if self._is_silent else RETRY_WAITS
        try:
            result = with_retries(action, f"{self.url}/{name}", waits)
            self._is_silent = False
            return result
        except Exception as error:  # each storage has its own errors
            self._is_silent = is_silence(error)
            if isinstance(error, FileNotFoundError) or _is_disk_full(error):
                raise
            tries = "" if is_final(error) or not waits else f" in {len(waits) + 1} tries"
            kind = PermissionError if is_final(error) else OSError
            raise kind(f"{self.url}/{name} could not be {done}{tries}: {in_words(error)}") from error


def version_of(files: Any, path: str, info: Mapping[str, Any]) -> str:
    """Return what changes with the content of an object, as far as its file system tells."""
    keys = ("md5Hash", "etag", "ETag", "sha256", "blob_id", "generation")
    return str(next((info[key] for key in keys if info.get(key)), None) or files.ukey(path))


async def _while_it_moves(upload: Coroutine[Any, Any, T], moved: fsspec.Callback, seconds: float) -> T:
    """Await an upload that counts its bytes in `moved`. Raises Silence if no byte moves for that many `seconds`."""
    task = asyncio.ensure_future(upload)
    while not task.done():
        before = moved.value
        await asyncio.wait([task], timeout=seconds)
        if not task.done() and moved.value == before:
            task.cancel()
            raise Silence(f"nothing got through within {seconds:.0f} s")
    return await task


def download(files: Any, source: str, target: Path) -> str:
    """Write the file to `target` and return its SHA-256. Raises OSError, also if it ends early."""
    promised = files.size(source)
    if _is_known(files):
        # As one stream: s3fs would hold 500 MB otherwise. Older ones know nothing else.
        one = {"max_concurrency": 1} if "max_concurrency" in inspect.signature(files._get_file).parameters else {}
        files.get_file(source, str(target), **one)
    else:
        with files.open(source, "rb", cache_type="none") as stream, target.open("wb") as out:
            while block := stream.read(_BLOCK_BYTES):
                out.write(block)
    with target.open("rb") as out:
        os.fsync(out.fileno())
        size = out.seek(0, os.SEEK_END)
    if promised is not None and size != promised:
        raise OSError(f"{size} of {promised} bytes arrived")
    return file_sha256(target)


def with_retries(action: Callable[[], T], what: str, waits: Iterable[float] | None = None) -> T:
    """Return what `action` returns, tried again after errors of the network. A line says so if it was silence.

    Args:
        what: the URL.
        waits: seconds before each further try; None means RETRY_WAITS."""
    for wait in RETRY_WAITS if waits is None else waits:
        try:
            return action()
        except Exception as error:  # HTTP libraries have their own
            if is_final(error):
                raise
            if is_silence(error):
                LOGGER.warning(f"{what}: {in_words(error)}; trying again")
            time.sleep(wait * random.uniform(0.75, 1.25))
    return action()


def is_final(error: Exception) -> bool:
    """Tell whether trying again is of no use: nothing is there, or the storage refuses."""
    # gcsfs has no errors of its own for 401 and 403, fsspec none for web servers, and those of botocore and google.auth are
    # no PermissionErrors.
    is_refused = str(error).startswith("Forbidden") or "Credentials" in type(error).__name__
    is_refused |= type(error).__name__ == "RefreshError"
    # 404, 405 and 501 are a web server's answers to who wants to write.
    is_refused |= any(getattr(error, name, None) in (401, 403, 404, 405, 501) for name in ("status", "code"))
    return isinstance(error, _FINAL) or is_refused or _is_disk_full(error)


def is_silence(error: Exception) -> bool:
    """Tell whether a store has not answered at all."""
    return isinstance(error, Silence) or "Timeout" in type(error).__name__  # of botocore, aiohttp, httpx, fsspec


def _is_disk_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def in_words(error: BaseException) -> str:
    if not str(error) and error.__cause__:  # fsspec's own error for a timeout
        error = error.__cause__
    return f"{type(error).__name__}: {in_one_line(error)}"


def _at_once(action: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> list[T]:
    """Call `action` with each of the arguments, a few at a time. After a failure no further ones begin.

    Its threads keep no process from ending, as those of an executor do: a file on its way may take minutes."""
    waiting, lock = list(enumerate(arguments)), threading.Lock()
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    tasks = iter(waiting)

    def work() -> None:
        while not errors:
            with lock:
                task = next(tasks, None)
            if task is None:
                return
            try:
                results[task[0]] = action(*task[1])
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, name="storage", daemon=True) for _ in waiting[:_FILES_AT_ONCE]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(waiting))]
