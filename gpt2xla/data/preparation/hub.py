"""Data sets on the Hugging Face hub, or in a local folder: their files in order.

Files on the hub are fetched one after another, each while the previous one is read.
"""

from __future__ import annotations

import atexit
import contextlib
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

from gpt2xla import hub
from gpt2xla.data.documents import saved_dataset
from gpt2xla.data.documents.corpus import Part, Split, local_parts, remote_part
from gpt2xla.data.documents.reading_options import ALL_SUFFIXES, Reading, described
from gpt2xla.data.preparation.options import HubConfig
from gpt2xla.data.preparation.temporary_folder import temporary_folder
from gpt2xla.errors import InputError, RunFailed, counted, user_error

T = TypeVar("T")
_LONGEST_WAIT = 60.0
_NAMES_PER_REQUEST = 500
_CARD = "README.md"  # describes a data set, and may list its files


def dataset_parts(options: HubConfig, say: Callable[[str], None] = print) -> list[Part]:
    """Return the files of a data set, at its newest revision. Raises InputError if there is no such data set, configuration
    or split, or its files are not supported, and RunFailed if the hub does not answer."""
    if not options.dataset:
        raise InputError("--dataset is empty; give a name on the hub, or a local folder")
    folder, what = Path(options.dataset), f"--dataset {options.dataset}"
    if not folder.is_dir():
        return _Hub(options, say).parts()
    local = partial(
        local_parts, column=options.text_column, split_by=options.split_by or "file", format=options.format,
        option="--dataset", say=say,
    )  # fmt: skip
    is_saved = (folder / saved_dataset.SPLITS).is_file()
    by_split = {} if is_saved else _splits_by_name(options, folder)
    if not (is_saved or by_split):
        if options.split != "train" or options.test_split:
            raise InputError(f"{what} is a folder of files without splits; leave --split and --test-split out")
        return local([folder], exclude=(_CARD,) if (folder / _CARD).exists() else ())  # as datasets does

    def files_of(split: str) -> list[Path]:
        if is_saved:
            return [saved_dataset.split_folder(folder, split, "--dataset")]
        if split not in by_split:
            raise InputError(f"{what} has no split {split!r} but {', '.join(by_split)}; choose with --split")
        return by_split[split]

    parts = local(files_of(options.split))
    if options.test_split:
        tests = local(files_of(options.test_split))
        parts = [replace(part, split="train") for part in parts] + [replace(part, split="test") for part in tests]
    return parts


def _splits_by_name(options: HubConfig, folder: Path) -> dict[str, list[Path]]:
    """Return the files of a folder by split, as its README.md lists them or `datasets` finds them by name; {} if neither.
    Raises InputError if `datasets` cannot read the folder, or one of several configurations must be chosen."""
    if saved_dataset.is_one(folder):
        return {}
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity_error()
    card, is_listed = folder / _CARD, False
    try:
        is_listed = card.exists() and bool((huggingface_hub.metadata_load(card) or {}).get("configs"))
        with tempfile.TemporaryDirectory() as cache:  # datasets makes a folder there, which is not needed
            config = options.config if is_listed else None
            builder = datasets.load_dataset_builder(str(folder.absolute()), name=config, cache_dir=cache)
    except (ValueError, OSError, RuntimeError, yaml.YAMLError) as error:
        if isinstance(error, FileNotFoundError) and not is_listed:  # no format that datasets reads
            return {}
        fix = "choose with --config, or name a part of it"
        raise InputError(f"--dataset {folder}: {_in_words(error)}; {fix}") from None
    found = {str(split): list(map(Path, files)) for split, files in (builder.config.data_files or {}).items()}
    return {} if found.keys() == {"train"} and not is_listed else found


@dataclass(frozen=True)
class _File:
    """A file on the hub. `content` is the hub's hash of it."""

    repo: str
    revision: str
    name: str
    size: int
    content: str


class _Hub:
    """One data set on the hub. Fetches its files, each while the previous one is read."""

    def __init__(self, options: HubConfig, say: Callable[[str], None]) -> None:
        self._options, self._say = options, say
        self._what = f"--dataset {options.dataset}"
        self._where: dict[str, Any] = {"cache_dir": options.cache_dir or None}
        self._files: list[_File] = []
        self._fetching: dict[int, Future[Path]] = {}

    def parts(self) -> list[Part]:
        if hub.is_offline():
            raise InputError(f"{self._what}: HF_HUB_OFFLINE is set; unset it, or name a local folder")
        _keep_libraries_quiet()
        options = self._options
        wanted: list[tuple[str, Split | None]] = [(options.split, "train" if options.test_split else None)]
        if options.test_split:
            wanted.append((options.test_split, "test"))
        reading = Reading(options.text_column, options.split_by or "line", options.format)
        parts = []
        for file, destination in self._patiently(lambda: self._find(wanted), self._what):
            if not file.name.endswith(ALL_SUFFIXES):
                raise InputError(f"{self._what} holds {file.name}, none of {described(ALL_SUFFIXES)}; choose another")
            # By its content, not by the revision: a new commit to the data set's card changes no token.
            name, opened = f"{file.repo}/{file.name}", partial(self.opened, len(self._files))
            parts.append(remote_part(name, file.content, file.size, opened, reading, destination, self._say))
            self._files.append(file)
        if options.streaming:
            until_exit = contextlib.ExitStack()
            with user_error(f"--cache-dir {options.cache_dir}"):
                self._where = {"local_dir": until_exit.enter_context(temporary_folder(options.cache_dir or None))}
            atexit.register(until_exit.close)
        return parts

    @contextlib.contextmanager
    def opened(self, number: int) -> Iterator[Path]:
        """Give the path of file `number`, and begin to fetch the next one."""
        self._start_fetching(number)
        file = self._fetching.pop(number).result()
        self._start_fetching(number + 1)
        try:
            yield file
        finally:
            if self._options.streaming:
                file.unlink(missing_ok=True)

    def _find(self, wanted: list[tuple[str, Split | None]]) -> list[tuple[_File, Split | None]]:
        """Return the files of the wanted splits, each with the split that it goes to."""
        import datasets
        from huggingface_hub import HfApi, HfFileSystem

        options, result = self._options, []
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
                        file = _File(repo, revision, name, infos[name].size, infos[name].blob_id)
                        result.append((file, destination))
        except (ValueError, OSError, RuntimeError) as error:
            if hub.is_temporary(error):
                raise
            why = hub.answer(error) if hub.has_answered(error) else _in_words(error)
            raise InputError(f"{self._what}: {why}; check the name, --config and --split") from None
        return result

    def _start_fetching(self, number: int) -> None:
        if number < len(self._files) and number not in self._fetching:
            future = self._fetching[number] = Future()
            # A daemon: the end of the program waits for no file that nobody will read.
            threading.Thread(target=_fulfil, args=(future, partial(self._fetch, number)), daemon=True).start()

    def _fetch(self, number: int) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

        file = self._files[number]
        name = f"{file.repo}/{file.name}"

        def download() -> Path:
            where = {"repo_type": "dataset", "revision": file.revision, **self._where}
            try:
                return Path(hf_hub_download(file.repo, file.name, **where))
            except RuntimeError as error:  # xet knows no other
                raise ConnectionError(str(error)) from None

        try:
            return self._patiently(download, name)
        except (HfHubHTTPError, EntryNotFoundError) as error:
            raise InputError(f"{name}: {hub.reason(error, file.repo, 'data set')}") from None

    def _patiently(self, request: Callable[[], T], what: str) -> T:
        """Return what `request` returns, made again while hub or network fail: the hub's library tries for half a minute.
        Raises RunFailed if it failed each time."""
        failures = 0
        while True:
            try:
                return request()
            except Exception as error:
                if not hub.is_temporary(error):
                    raise
                why = f"{what}: {hub.answer(error)}"
                if failures == self._options.retries:
                    fix = "give the same command again once the hub answers"
                    raise RunFailed(f"{why}, {counted(failures + 1, 'time')}; {fix}") from None
            wait = min(2.0**failures, _LONGEST_WAIT)
            self._say(f"{why}; trying again in {wait:.0f} s")
            failures += 1
            time.sleep(wait)


def _keep_libraries_quiet() -> None:
    """Leave the talking to this program, and make no requests for what it does not need."""
    import datasets
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    datasets.config.USE_PARQUET_EXPORT = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    if not sys.stderr.isatty():
        disable_progress_bars()
        datasets.disable_progress_bars()


def _fulfil(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _in_words(error: BaseException) -> str:
    """Return in one line what `datasets` says, without its example."""
    return " ".join(str(error).split("\nExample")[0].split()).rstrip(".") or type(error).__name__
