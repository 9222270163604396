"""Corpora on the Hugging Face hub: their files in order, each fetched when its turn comes, the next one while it is read."""

from __future__ import annotations

import atexit
import contextlib
import http.client
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gpt2xla.config import option
from gpt2xla.data.documents import saved_dataset
from gpt2xla.data.documents.corpus import Part, Split, local_parts, remote_part
from gpt2xla.data.documents.reading import (
    ALL_SUFFIXES,
    COLUMN_HELP,
    FORMAT_HELP,
    SPLIT_HELP,
    Format,
    Reading,
    SplitBy,
    described,
)
from gpt2xla.data.preparation import passing_folder
from gpt2xla.errors import InputError, RunFailed, user_error

T = TypeVar("T")
_LONGEST_WAIT = 60.0
_NAMES_PER_REQUEST = 500
_CARD = "README.md"  # a data set's description, and perhaps the list of its files


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Data set"""

    dataset: str = option("HuggingFaceFW/fineweb", "name on the hub, or a local folder", is_path=True)
    config: str | None = option(None, "configuration of the data set; of a local folder, one that its README.md lists")
    split: str = option("train", "split to take")
    test_split: str | None = option(None, "split that becomes test/ (default: documents are drawn from --split)")
    text_column: str = option("text", COLUMN_HELP)
    split_by: SplitBy | None = option(None, f"{SPLIT_HELP} (default: file; line on the hub, as datasets reads it)")
    format: Format = option("auto", FORMAT_HELP)
    streaming: bool = option(False, "remove each file once it has been read, instead of keeping it in the hub's cache")
    cache_dir: str | None = option(None, "where files are kept (default: the hub's cache)", is_path=True)
    retries: int = option(8, "how often a failed request is made again, after 1, 2, 4, ... seconds, at most 60")


def dataset_parts(options: HubConfig, say: Callable[[str], None] = print) -> list[Part]:
    """The files of a data set, at its newest revision.

    Raises:
        InputError: no such data set, configuration or split, or none that consists of files we read.
        RunFailed: the hub does not answer.
    """
    if not options.dataset:
        raise InputError("--dataset is empty; give a name on the hub, or a local folder")
    folder = Path(options.dataset)
    if not folder.is_dir():
        return _Hub(options, say).parts()
    local = partial(
        local_parts, column=options.text_column, split_by=options.split_by or "file", format=options.format,
        option="--dataset", say=say,
    )  # fmt: skip
    if (folder / saved_dataset.SPLITS).is_file():
        files_of = partial(_saved_split, folder)
    elif by_split := _splits_by_name(options, folder):
        files_of = partial(_named_split, by_split, folder)
    elif options.split != "train" or options.test_split:
        raise InputError(f"--dataset {folder} is a folder of files without splits; leave --split and --test-split out")
    else:
        return local([folder], exclude=(_CARD,) if (folder / _CARD).exists() else ())  # as datasets does
    parts = local(files_of(options.split))
    if options.test_split:
        tests = local(files_of(options.test_split))
        parts = [replace(part, split="train") for part in parts] + [replace(part, split="test") for part in tests]
    return parts


def _saved_split(folder: Path, split: str) -> list[Path]:
    return [saved_dataset.split_folder(folder, split, "--dataset")]


def _named_split(by_split: dict[str, list[Path]], folder: Path, split: str) -> list[Path]:
    if split not in by_split:
        raise InputError(f"--dataset {folder} has no split {split!r} but {', '.join(by_split)}; choose with --split")
    return by_split[split]


def _splits_by_name(options: HubConfig, folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by split, as its README.md lists them or datasets tells them by their names; {} where nothing
    tells. Raises InputError, also for configurations of which none is chosen."""
    if saved_dataset.is_one(folder):
        return {}
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity_error()
    card, is_listed = folder / _CARD, False
    try:
        is_listed = card.exists() and bool((huggingface_hub.metadata_load(card) or {}).get("configs"))
        with tempfile.TemporaryDirectory() as cache:  # datasets makes a folder there, which nobody needs
            config = options.config if is_listed else None
            builder = datasets.load_dataset_builder(str(folder.absolute()), name=config, cache_dir=cache)
    except (ValueError, OSError, RuntimeError, yaml.YAMLError) as error:
        if isinstance(error, FileNotFoundError) and not is_listed:  # none of a format that datasets reads
            return {}
        raise InputError(f"--dataset {folder}: {_reason(error)}; choose with --config, or name a part of it") from None
    found = {str(split): list(map(Path, files)) for split, files in (builder.config.data_files or {}).items()}
    return {} if found.keys() == {"train"} and not is_listed else found


@dataclass(frozen=True)
class _File:
    repo: str
    revision: str
    name: str
    size: int
    content: str  # the hub's hash of it


class _Unanswered(Exception):
    """A request that the hub turned down for now, and after how many seconds it wants to see it again, if it says so."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class _Hub:
    """One data set on the hub. Fetches its files, one ahead of the reader."""

    def __init__(self, options: HubConfig, say: Callable[[str], None]) -> None:
        cache = options.cache_dir or None
        self._options, self._say = replace(options, cache_dir=cache), say
        self._what = f"--dataset {options.dataset}"
        self._files: list[_File] = []
        self._fetching: dict[int, Future[Path]] = {}
        self._passing: Path | None = None
        self._left = False
        self._gave_up: RunFailed | None = None

    def parts(self) -> list[Part]:
        wanted: list[tuple[str, Split | None]] = [(self._options.split, "train" if self._options.test_split else None)]
        if self._options.test_split:
            wanted.append((self._options.test_split, "test"))
        reading = Reading(self._options.text_column, self._options.split_by or "line", self._options.format)
        self._join()
        parts = []
        for file, destination in self._find(wanted):
            if not file.name.endswith(ALL_SUFFIXES):
                raise InputError(f"{self._what} holds {file.name}, none of {described(ALL_SUFFIXES)}; choose another")
            # By its content, not by the revision: a new commit to the data set's card changes no token.
            name, opened = f"{file.repo}/{file.name}", partial(self.opened, len(self._files))
            parts.append(remote_part(name, file.content, file.size, opened, reading, destination, self._say))
            self._files.append(file)
        if self._options.streaming:
            with user_error(f"--cache-dir {self._options.cache_dir}"):
                self._passing = passing_folder.make(self._options.cache_dir)
        atexit.register(self._leave)
        return parts

    @contextlib.contextmanager
    def opened(self, number: int) -> Iterator[Path]:
        self._start_fetching(number)
        file = self._fetching.pop(number).result()
        self._start_fetching(number + 1)
        try:
            yield file
        finally:
            if self._passing:
                file.unlink(missing_ok=True)

    def _join(self) -> None:
        """Let each request that the hub's library makes be made again here: in its own way it would do so silently, and
        begin a file anew if a request fails in the midst of it."""
        import datasets
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars, logging

        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise InputError(f"{self._what}: HF_HUB_OFFLINE is set; unset it, or name a local folder")

        def patient() -> Any:
            client = _another(session)
            client.send = partial(self._send, client.send)
            return client

        session = huggingface_hub.get_session()
        # The second: before 1.0.
        use = getattr(huggingface_hub, "set_client_factory", None) or huggingface_hub.configure_http_backend
        use(patient)
        logging.set_verbosity_error()
        datasets.logging.set_verbosity_error()
        # Requests to other servers, for what we do not need.
        datasets.config.USE_PARQUET_EXPORT = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
        if not sys.stderr.isatty():
            disable_progress_bars()
            datasets.disable_progress_bars()

    def _send(self, send: Callable[..., Any], request: Any, **how: Any) -> Any:
        def answered() -> Any:
            if self._left:
                raise RunFailed("the program has ended")
            response = send(request, **how)
            if response.status_code == 429 or response.status_code >= 500:
                response.close()
                raise _Unanswered(_status(response), _seconds_asked(response.headers))
            return response

        url = str(request.url).split("?")[0]
        if "/api/" in url and "/api/datasets/" not in url:  # the library's statistics: it goes on without an answer
            return send(request, **how)
        return self.retrying(answered, url)

    def _find(self, wanted: list[tuple[str, Split | None]]) -> Iterator[tuple[_File, Split | None]]:
        import datasets
        from huggingface_hub import HfApi, HfFileSystem

        options = self._options
        try:
            builder = datasets.load_dataset_builder(options.dataset, name=options.config)
            by_split = {str(split): list(map(str, urls)) for split, urls in (builder.config.data_files or {}).items()}
            for split, destination in wanted:
                if split not in by_split:
                    raise ValueError(f"no split {split!r} but {', '.join(by_split)}")
                files = [HfFileSystem().resolve_path(url) for url in by_split[split]]
                for first in range(0, len(files), _NAMES_PER_REQUEST):
                    some = files[first : first + _NAMES_PER_REQUEST]
                    repo, revision, names = some[0].repo_id, some[0].revision, [file.path_in_repo for file in some]
                    found = HfApi().get_paths_info(repo, names, repo_type="dataset", revision=revision)
                    infos = {info.path: info for info in found}
                    for name in names:
                        info = infos[name]
                        yield _File(repo, revision, name, info.size, info.blob_id), destination
        except (ValueError, OSError, RuntimeError) as error:
            if self._gave_up:  # whatever the libraries made of it
                raise self._gave_up from None
            raise InputError(f"{self._what}: {_reason(error)}; check the name, --config and --split") from None

    def _leave(self) -> None:
        """Remove what a thread may still be fetching from under it: it makes no more requests, but files for a moment."""
        self._left = True
        for _ in range(10 if self._fetching else 1):
            if self._passing:
                shutil.rmtree(self._passing, ignore_errors=True)
            else:
                _remove_what_is_being_written()
            time.sleep(0.01)

    def _start_fetching(self, number: int) -> None:
        if number < len(self._files) and number not in self._fetching:
            future = self._fetching[number] = Future()
            # A daemon: the end of the program waits for no file that nobody will read.
            threading.Thread(target=_fulfil, args=(future, partial(self._fetch, number)), daemon=True).start()

    def _fetch(self, number: int) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

        file = self._files[number]
        where = {"local_dir": self._passing} if self._passing else {"cache_dir": self._options.cache_dir}

        def download() -> Path:
            try:
                return Path(hf_hub_download(file.repo, file.name, repo_type="dataset", revision=file.revision, **where))
            except (HfHubHTTPError, EntryNotFoundError) as error:
                raise InputError(f"{file.repo}/{file.name}: {_reason(error)}") from None

        return self.retrying(download, f"{file.repo}/{file.name}")

    def retrying(self, request: Callable[[], T], what: str) -> T:
        """What `request` gives at last. Raises RunFailed if that is nothing, and at once what waiting cannot mend."""
        failures = 0
        while True:
            try:
                return request()
            except Exception as error:
                if _is_final(error):
                    raise
                if failures == self._options.retries:
                    self._gave_up = RunFailed(
                        f"{what}: {_reason(error)}, {failures + 1} times; give the same command again once the hub answers"
                    )
                    raise self._gave_up from None
                wait = min(max(2.0**failures, getattr(error, "seconds", 0.0)), _LONGEST_WAIT)
                self._say(f"{what}: {_reason(error)}; trying again in {wait:.0f} s")
                failures += 1
                time.sleep(wait)


def _another(session: Any) -> Any:
    """A session as the hub's library makes them: httpx's, or before 1.0 that of requests."""
    if hasattr(session, "adapters"):
        new = type(session)()
        for prefix, adapter in session.adapters.items():
            new.mount(prefix, adapter)
        return new
    return type(session)(
        event_hooks=session.event_hooks, follow_redirects=session.follow_redirects, timeout=session.timeout
    )


def _remove_what_is_being_written() -> None:
    """The unfinished files in the hub's cache that this process, and no other one, has open."""
    for descriptor in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            if (file := os.readlink(descriptor)).endswith(".incomplete"):
                os.unlink(file)


def _fulfil(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _is_final(error: Exception) -> bool:
    """Everything else is the network: requests, httpx and xet have no common error for it."""
    is_local = isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError)
    return bool(is_local) or isinstance(error, InputError | RunFailed)


def _seconds_asked(headers: Any) -> float:
    """Of "Retry-After: 7" or the hub's own "RateLimit: "api";r=0;t=7"."""
    found = re.search(r"^\d+$", headers.get("Retry-After", "")) or re.search(
        r"(?<=t=)\d+", headers.get("RateLimit", "")
    )
    return float(found[0]) if found else 0.0


def _status(response: Any) -> str:
    return f"{response.status_code} {http.client.responses.get(response.status_code, '')}".strip()


def _reason(error: BaseException) -> str:
    """In a line."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    if (response := getattr(cause, "response", None)) is not None:
        return f"{_status(response)} for {str(response.url).split('?')[0]}"
    text = str(error).split("\nExample")[0]
    return " ".join(text.split()).rstrip(".") or type(error).__name__
