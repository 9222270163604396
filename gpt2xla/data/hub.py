"""Corpora on the Hugging Face hub: their files in order, each fetched when its turn comes, the next one while it is read."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from gpt2xla.config import option
from gpt2xla.data.corpus import ALL_SUFFIXES, Part, Split, local_parts, reader
from gpt2xla.errors import InputError, RunFailed, blaming

T = TypeVar("T")
_LONGEST_WAIT = 60.0


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Data set"""

    dataset: str = option("HuggingFaceFW/fineweb", "name on the hub, or a local folder")
    config: str | None = option(None, "configuration of the data set; of a local folder there is none")
    split: str = option("train", "split to take")
    test_split: str | None = option(None, "split that becomes test/ (default: documents are drawn from --split)")
    text_column: str = option("text", "column or field that holds the text")
    streaming: bool = option(False, "remove each file once it has been read, instead of keeping it in the hub's cache")
    cache_dir: str | None = option(None, "where files are kept (default: the hub's cache)")
    retries: int = option(8, "how often a failed request is made again, after 1, 2, 4, ... seconds, at most 60")


def dataset_parts(options: HubConfig, say: Callable[[str], None] = print) -> list[Part]:
    """The files of a data set, at its newest revision.

    Raises:
        InputError: no such data set, configuration or split, or none that consists of files we read.
        RunFailed: the hub does not answer.
    """
    if Path(options.dataset).is_dir():
        return local_parts([options.dataset], column=options.text_column, option="--dataset")
    import datasets
    from huggingface_hub import HfApi, HfFileSystem

    def resolve() -> tuple[str, str, dict[str, int], dict[str, list[str]]]:
        builder = datasets.load_dataset_builder(options.dataset, name=options.config, cache_dir=options.cache_dir)
        by_split = {
            str(split): [HfFileSystem().resolve_path(str(url)) for url in urls]
            for split, urls in (builder.config.data_files or {}).items()
        }
        if not by_split:
            raise ValueError("it is made by a script; choose one that consists of files")
        some = next(iter(by_split.values()))[0]
        names = [file.path_in_repo for files in by_split.values() for file in files]
        infos = HfApi().get_paths_info(some.repo_id, names, repo_type="dataset", revision=some.revision)
        files = {split: [file.path_in_repo for file in files] for split, files in by_split.items()}
        return some.repo_id, some.revision, {info.path: info.size for info in infos}, files

    hub = _Hub(options, say)
    what = f"--dataset {options.dataset}"
    try:
        repo, revision, sizes, by_split = hub.retrying(resolve, what)
    except (ValueError, OSError) as error:
        raise InputError(f"{what}: {_first_line(error)}; check the name and --config") from None
    taken: list[tuple[str, Split | None]] = [(options.split, "train" if options.test_split else None)]
    if options.test_split:
        taken.append((options.test_split, "test"))
    parts = []
    for split, destination in taken:
        if split not in by_split:
            raise InputError(f"{what} has no split {split!r} but {', '.join(by_split)}; choose one of them")
        for name in by_split[split]:
            if not name.endswith(ALL_SUFFIXES):
                raise InputError(f"{what} holds {name}, which is none of {', '.join(ALL_SUFFIXES)}; choose another")
            opened = partial(hub.opened, len(hub.files))
            hub.files.append((repo, revision, name))
            parts.append(
                Part(f"{repo}@{revision}/{name}", sizes[name], opened, reader(name, options.text_column), destination)
            )
    return parts


class _Hub:
    """Fetches files, one ahead of the reader."""

    def __init__(self, options: HubConfig, say: Callable[[str], None]) -> None:
        self.files: list[tuple[str, str, str]] = []  # repository, revision, path
        self._options, self._say = options, say
        self._fetcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub")
        self._fetching: dict[int, Future[Path]] = {}
        self._passing: Path | None = None
        if options.streaming:
            with blaming(f"--cache-dir {options.cache_dir}"):
                self._passing = Path(tempfile.mkdtemp(prefix="gpt2xla-", dir=options.cache_dir))

    @contextlib.contextmanager
    def opened(self, number: int) -> Iterator[Path]:
        for wanted in (number, number + 1):
            if wanted < len(self.files) and wanted not in self._fetching:
                self._fetching[wanted] = self._fetcher.submit(self._fetch, wanted)
        file = self._fetching.pop(number).result()
        try:
            yield file
        finally:
            if self._passing:
                file.unlink(missing_ok=True)
                if number + 1 == len(self.files):
                    shutil.rmtree(self._passing, ignore_errors=True)

    def _fetch(self, number: int) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        repo, revision, name = self.files[number]
        where = {"local_dir": self._passing} if self._passing else {"cache_dir": self._options.cache_dir}
        try:
            return Path(
                self.retrying(
                    lambda: hf_hub_download(repo, name, repo_type="dataset", revision=revision, **where),
                    f"{repo}/{name}",
                )
            )
        except HfHubHTTPError as error:
            raise InputError(f"{repo}/{name}: {_first_line(error)}") from None

    def retrying(self, request: Callable[[], T], what: str) -> T:
        """What `request` gives at last. Raises RunFailed if the hub does not answer, and other errors as they come."""
        failures = 0
        while True:
            try:
                return request()
            except Exception as error:
                wait = _seconds_to_wait(error, failures)
                if wait is None:
                    raise
                if failures == self._options.retries:
                    raise RunFailed(
                        f"{what}: {_first_line(error)}, {failures + 1} times. What is prepared is kept: give the same "
                        "command again once the hub answers"
                    ) from None
                self._say(f"{what}: {_first_line(error)}; trying again in {wait:.0f} s")
                failures += 1
                time.sleep(wait)


def _seconds_to_wait(error: Exception, failures: int) -> float | None:
    """Before the request is made again; None where that would not help."""
    import httpx
    import requests
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wait = min(2.0**failures, _LONGEST_WAIT)
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code != 429 and error.response.status_code < 500:
            return None
        asked = error.response.headers.get("Retry-After", "")
        return min(max(wait, float(asked)), _LONGEST_WAIT) if asked.isdigit() else wait
    unreachable = (
        LocalEntryNotFoundError,
        ConnectionError,
        TimeoutError,
        requests.RequestException,
        httpx.TransportError,
    )
    cut_short = isinstance(error, OSError) and "Consistency check failed" in str(error)
    return wait if cut_short or isinstance(error, unreachable) else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
