"""Finds the files below given paths, in a fixed order, each once, and counts in one line what it leaves out."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpt2xla.data.documents import saved_dataset
from gpt2xla.data.documents.reading_options import PACKED, described
from gpt2xla.errors import InputError, user_error

_METADATA = (saved_dataset.INFO, saved_dataset.STATE, saved_dataset.SPLITS, "dataset_infos.json")
_MOST_EXAMPLES = 5


def find(
    paths: Sequence[str | Path],
    suffixes: tuple[str, ...],
    exclude: tuple[str, ...],
    option: str,
    say: Callable[[str], None],
) -> list[Path]:
    """Return the files among `paths` and those below its folders whose name ends in one of `suffixes`.

    In a folder, files come before subfolders, sorted by name. Hidden ones are left out unless `paths` names them. A folder
    that `datasets` saved is read as its own list says; if it has several splits, "train". Raises InputError if a path
    does not exist, cannot be read or is not a file, or nothing was found.
    """
    search = _Search(suffixes, exclude, option)
    for path in paths:
        if not str(path):
            raise InputError(f"{option} is empty; name a file or folder, the one you are in as .")
        with user_error(f"{option} {path}"):
            search.path(Path(path))
    left_out = [f"{len(names):,} {why} ({_examples(names)})" for why, names in search.left_out.items()]
    if not search.files:
        instead = f"; there are {', '.join(left_out)}: name the files that you want" if left_out else ""
        raise InputError(f"{option} {' '.join(map(str, paths))}: no files ending in {described(suffixes)}{instead}")
    _refuse_twins(search.files, option)
    if left_out:
        say(f"left out: {', '.join(left_out)}")
    for pattern in exclude:
        if pattern not in search.matched:
            say(f"note: --exclude {pattern} matches nothing")
    return search.files


def _refuse_twins(files: list[Path], option: str) -> None:
    by_content: dict[Path, Path] = {}
    for file in files:
        content = file
        while content.suffix.lower() in PACKED:
            content = content.with_suffix("")
        if (other := by_content.setdefault(content, file)) is not file:
            same = "may be the same text, compressed or not"
            raise InputError(f"{option} {other} and {file.name} {same}; move one away, or leave it out (--exclude)")


def _examples(names: list[str]) -> str:
    different = list(dict.fromkeys(names))
    return ", ".join(different[:_MOST_EXAMPLES]) + (", ..." if len(different) > _MOST_EXAMPLES else "")


@dataclass
class _Search:
    suffixes: tuple[str, ...]
    exclude: tuple[str, ...]
    option: str
    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    matched: set[str] = field(default_factory=set)
    seen: set[tuple[int, int]] = field(default_factory=set)

    def path(self, path: Path) -> None:
        if path.is_dir():
            self._folder(path, path, set())
        elif not path.exists():
            raise InputError(f"{self.option} {path}: no such file or folder")
        elif not self._is_excluded(path.name, path.name):
            self._file(path)

    def _folder(self, folder: Path, top: Path, seen: set[str]) -> None:
        real = os.path.realpath(folder)
        if real in seen:  # links may form a circle
            self._leave_out("reached twice", str(folder))
            return
        seen.add(real)
        if (folder / saved_dataset.SPLITS).is_file():
            for split in saved_dataset.splits(folder, self.option):
                if split != "train":
                    self._leave_out("of other splits", split)
            self._folder(saved_dataset.split_folder(folder, "train", self.option), top, seen)
        elif saved_dataset.is_one(folder):
            files = saved_dataset.data_files(folder, self.option)
            for file in files:
                if not self._is_excluded(file.name, file.relative_to(top).as_posix()):
                    self._file(file)
            for file in sorted(set(folder.glob("*.arrow")) - set(files)):
                self._leave_out("stale, since state.json does not name them", file.name)
        else:
            self._entries(folder, top, seen)

    def _entries(self, folder: Path, top: Path, seen: set[str]) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            fix = "make it readable, or leave it out: --exclude"
            raise InputError(f"{self.option} {folder}: {error.strerror}; {fix}") from None
        folders, has_cache = [], (folder / saved_dataset.INFO).exists()
        for entry in entries:
            path = Path(entry.path)
            if self._is_excluded(entry.name, path.relative_to(top).as_posix()):
                continue
            if entry.name.startswith("."):
                self._leave_out("hidden", entry.name)
            elif entry.is_dir():
                folders.append(path)
            elif not entry.name.lower().endswith(self.suffixes):
                self._leave_out("of other kinds", _suffix(entry.name))
            elif entry.name in _METADATA or (has_cache and fnmatch.fnmatchcase(entry.name, "cache-*.arrow")):
                self._leave_out("of what `datasets` keeps beside its data", entry.name)
            else:
                self._file(path)
        if len(folders) > 1 and folder.name == "snapshots" and (folder.parent / "blobs").is_dir():
            held = f"{len(folders)} revisions of the same files, as the hub's cache does"
            raise InputError(f"{self.option} {folder} holds {held}; name the folder of one")
        for path in folders:
            self._folder(path, top, seen)

    def _file(self, path: Path) -> None:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise InputError(f"{self.option} {str(path)!a}: its name is not UTF-8; rename it") from None
        if path.exists() and not path.is_file():  # reading from a pipe would wait for ever
            raise InputError(f"{self.option} {path} is not a regular file; leave it out")
        status = path.stat()
        if (status.st_dev, status.st_ino) in self.seen:  # also through links of either kind
            self._leave_out("reached twice", str(path))
        else:
            self.seen.add((status.st_dev, status.st_ino))
            self.files.append(path)

    def _is_excluded(self, name: str, relative: str) -> bool:
        for pattern in self.exclude:
            bare = pattern.removeprefix("./").removeprefix("**/").rstrip("/")
            if any(text == bare or fnmatch.fnmatchcase(text, bare) for text in (name, relative)):
                self.matched.add(pattern)
                self._leave_out("excluded", name)
                return True
        return False

    def _leave_out(self, why: str, name: str) -> None:
        self.left_out.setdefault(why, []).append(name)


def _suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    if suffix.lower() in PACKED:
        suffix = os.path.splitext(stem)[1] + suffix
    return suffix or "without a suffix"
