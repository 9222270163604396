"""A split on disk: a folder of token shards, read as one stream of tokens without loading it.

Shards are our own, with a `manifest.json`, or those of other programs (`shard_files/`), in the order of their names.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_origin, get_type_hints

import numpy as np

from gpt2xla.config.paths import PREPARE, check_shards, is_url
from gpt2xla.data.remote import DEFAULT_CACHE, Cache, RemoteFolder
from gpt2xla.data.shard_files.foreign_shards import pointer
from gpt2xla.data.shard_files.raw_ids import largest_sampled
from gpt2xla.data.shard_files.shard_folder import refuse_others, shards_of
from gpt2xla.data.shard_files.shard_format import RAW, SUFFIXES, Shard, open_shard
from gpt2xla.errors import InputError, user_error
from gpt2xla.files import file_sha256, read_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ShardEntry:
    """One shard in a manifest."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The `manifest.json` of a split: what it was made of and with. Models and resumed runs are matched to it."""

    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eot_id: int | None
    dtype: str
    tokens: int
    documents: int
    bytes: int
    shards: tuple[ShardEntry, ...]

    def save(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """Return the folder's manifest, or None if there is none. Raises InputError if it is another program's."""
        file = folder / MANIFEST
        if not file.exists():
            return None
        try:
            if what := pointer(file.read_bytes()):
                raise ValueError(f"it is {what}")
            values = read_json(file)
            shards = tuple(ShardEntry(**entry) for entry in values.pop("shards"))
            manifest = cls(**values, shards=shards)
            _check_types(manifest, *shards)
            if manifest.vocab_size < 0:
                raise ValueError(f"vocab_size is {manifest.vocab_size}")
            if manifest.dtype not in ("uint16", "uint32"):
                raise ValueError(f"dtype is {manifest.dtype[:80]!r}")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{file} is not a manifest of token shards ({error}); prepare the data again") from None
        if any(Path(shard.file).name != shard.file or shard.file in ("", "..") for shard in shards):
            raise InputError(f"{file} names a shard outside of its folder; prepare the data again")
        return manifest


class TokenStream:
    """All tokens of a split as one sequence.

    Shards of a local folder are memory-mapped at once; those behind a URL are fetched when they are first read. Raises
    InputError if the folder is missing or empty, or a shard is damaged, of an unknown format, or does not fit the manifest
    or the other shards.

    Attributes:
        name: the folder or URL, as the user wrote it.
        folder: where manifest and tokenizer lie on this machine.
        length: number of tokens.
        dtype: type of what `read` returns.
        manifest: the split's manifest, or None for a plain folder.
        fingerprint: changes when the tokens change; without a manifest, when names or lengths of shards change.
        format: name of the shards' format.
        notes: notes for the user: which files were chosen, what is odd about them.
    """

    def __init__(self, folder: str | Path, option: str = "--train-dir", cache: Cache = DEFAULT_CACHE) -> None:
        self.name, self.option = str(folder), option
        self._remote = RemoteFolder(self.name, option, cache, MANIFEST) if is_url(self.name) else None
        self.folder = self._remote.folder if self._remote else Path(folder)
        self.notes: list[str] = []
        check_shards(option, str(folder))
        with user_error(f"{option} {folder}"):  # no permission
            self.manifest = Manifest.load(self.folder)
            if self.manifest:
                self.files = [self.folder / shard.file for shard in self.manifest.shards]
            else:
                self.files, self.notes = shards_of(self.folder, option)
        if not self.files:
            fix = f"make some with {PREPARE}"
            raise InputError(f"{option} {folder} holds no shards ({', '.join(SUFFIXES)}); {fix}")
        self._shards: list[np.ndarray | None]  # a remote one is None until it is read
        self.format = "numpy"
        if self._remote and self.manifest:
            self._shards = [None] * len(self.files)
            lengths, dtypes = [shard.tokens for shard in self.manifest.shards], {np.dtype(self.manifest.dtype)}
        else:
            shards = [self._open(number) for number in range(len(self.files))]
            self._shards = [shard.tokens for shard in shards]
            lengths, dtypes = [len(shard.tokens) for shard in shards], {shard.tokens.dtype for shard in shards}
            self.format = shards[0].format
            for shard, file in zip(shards, self.files, strict=True):
                if shard.format != self.format:
                    raise InputError(
                        f"{option} {folder} holds shards of two formats: {self.files[0].name} ({self.format}) and "
                        f"{file.name} ({shard.format}); give each its own folder, or move away what is not a shard"
                    )
            self.notes += [f"note: {shard.note}" for shard in shards if shard.note]
            if self.manifest:
                refuse_others(self.folder, self.files, MANIFEST)
        # Plain lists: looking up one position in them is several times faster than in an array.
        self._ends = list(itertools.accumulate(lengths))
        self._starts = [0, *self._ends[:-1]]
        self.length = self._ends[-1]
        if self.manifest and self.manifest.tokens != self.length:
            wrong = f"promises {self.manifest.tokens} tokens but its shards hold {self.length}"
            raise InputError(f"{self.folder / MANIFEST} {wrong}; prepare the data again")
        self.dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.int64)
        marks: list = [(file.name, length) for file, length in zip(self.files, lengths, strict=True)]
        if self.manifest:
            marks = [shard.sha256 for shard in self.manifest.shards]
        self.fingerprint = hashlib.sha256(json.dumps(marks).encode()).hexdigest()

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens start .. start + count - 1, across shard borders; no copy if they lie in one shard."""
        assert 0 <= start <= self.length - count, (start, count, self.length)
        number = bisect_right(self._ends, start) if count else 0
        part = self._part(number, start, count)
        if len(part) == count:
            return part
        parts = [part]
        while missing := count - sum(map(len, parts)):
            number += 1
            parts.append(self._part(number, self._starts[number], missing))
        return np.concatenate(parts, dtype=self.dtype)

    @property
    def is_remote(self) -> bool:
        return self._remote is not None

    @property
    def bytes(self) -> int:
        """How many bytes the tokens take on disk."""
        return self.length * self.dtype.itemsize

    @property
    def largest_shard_bytes(self) -> int:
        return max(end - start for start, end in zip(self._starts, self._ends, strict=True)) * self.dtype.itemsize

    def file_of(self, position: int) -> Path:
        return self.files[bisect_right(self._ends, position)]

    def check_ids(self, vocab_size: int) -> None:
        """Raise InputError if ids do not fit the model: by the manifest, and by a sample of each shard on this machine. All
        ids are checked when they are read."""
        here = [(shard, file) for shard, file in zip(self._shards, self.files, strict=True) if shard is not None]
        largest, file = max(((largest_sampled(shard), file) for shard, file in here), default=(0, self.folder))
        if self.manifest:
            if largest >= self.manifest.vocab_size:
                wrong = f"holds id {largest}, but {MANIFEST} says that ids lie below {self.manifest.vocab_size}"
                raise InputError(f"{file} {wrong}: it is damaged; copy or prepare it again")
            largest, file = self.manifest.vocab_size - 1, self.folder / MANIFEST
        if largest >= vocab_size:
            raise InputError(
                f"--vocab-size {vocab_size} is too small for {file}, which holds ids up to {largest}; "
                f"use at least {largest + 1}{', or it is not a file of uint16 ids' if self.format == RAW else ''}"
            )

    def verify(self) -> None:
        """Compare every shard with the hash in the manifest, several at a time. Raises InputError, naming the first one that
        differs, or if there is no manifest."""
        if not self.manifest:
            fix = "prepare it again or leave the flag out"
            raise InputError(f"--verify-data: {self.name} has no {MANIFEST} with hashes to check; {fix}")

        def check(number_and_shard: tuple[int, ShardEntry]) -> None:
            number, shard = number_and_shard
            with self._local_file(number) as file:
                found = file_sha256(file)
            if found != shard.sha256:
                fix = "remove it and start again" if self._remote else "copy or prepare it again"
                wrong = f"is not what {MANIFEST} says (sha256 differs): it is damaged"
                raise InputError(f"{self.files[number]} {wrong}; {fix}")

        # hashlib lets other threads run while it works.
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
            for _ in threads.map(check, enumerate(self.manifest.shards)):
                pass

    def _part(self, number: int, start: int, count: int) -> np.ndarray:
        shard, offset = self._shards[number], start - self._starts[number]
        return (self._fetch(number) if shard is None else shard)[offset : offset + count]

    def _fetch(self, number: int) -> np.ndarray:
        assert self._remote is not None
        assert self.manifest is not None
        if self._remote.cache.limit:  # a mapped file takes room on the disk even after it is deleted
            self._shards = [None] * len(self.files)
        with self._local_file(number):
            shard = self._shards[number] = self._open(number).tokens
        following = self.manifest.shards[(number + 1) % len(self.files)]
        self._remote.fetch_ahead(following.file, following.sha256)
        return shard

    def _local_file(self, number: int) -> contextlib.AbstractContextManager[Path]:
        if self._remote and self.manifest:
            shard = self.manifest.shards[number]
            return self._remote.at_hand(shard.file, shard.sha256)
        return contextlib.nullcontext(self.files[number])

    def _open(self, number: int) -> Shard:
        file, manifest = self.files[number], self.manifest
        if manifest and not file.exists():
            raise InputError(f"{file} is missing although {MANIFEST} names it; prepare the data again")
        shard = open_shard(file)
        if manifest:
            tokens = manifest.shards[number].tokens
            if len(shard.tokens) != tokens or shard.tokens.dtype != np.dtype(manifest.dtype):
                held = f"holds {len(shard.tokens)} {shard.tokens.dtype} tokens"
                raise InputError(f"{file} {held} but {MANIFEST} says {tokens} {manifest.dtype}; prepare the data again")
        return shard


def _check_types(*parts: Manifest | ShardEntry) -> None:
    for part in parts:
        for name, kind in get_type_hints(type(part)).items():
            plain = tuple if get_origin(kind) is tuple else kind
            if not isinstance(getattr(part, name), plain):
                raise ValueError(f"{name} is {repr(getattr(part, name))[:80]}")
