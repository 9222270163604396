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
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import numpy as np

from gpt2xla.config.paths import PREPARE, check_shards, is_url
from gpt2xla.data.remote import DEFAULT_CACHE, Cache, RemoteFolder
from gpt2xla.data.shard_files.foreign_shards import pointer
from gpt2xla.data.shard_files.mask_file import mask_of, open_mask, read_bits
from gpt2xla.data.shard_files.raw_ids import largest_sampled
from gpt2xla.data.shard_files.shard_folder import refuse_others, shards_of
from gpt2xla.data.shard_files.shard_format import RAW, SUFFIXES, Shard, open_shard
from gpt2xla.errors import InputError, user_error
from gpt2xla.files import file_sha256, read_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ShardEntry:
    """One shard in a manifest. `mask_sha256` is the hash of its mask, if it has one."""

    file: str
    tokens: int
    sha256: str
    mask_sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The `manifest.json` of a split: what it was made of and with. Models and resumed runs are matched to it.

    The last three belong to masked rows (`preparation/rows.py`), of which each shard has a mask: the tokens of a row, how
    many tokens of the split are trained on, and, of conversations, the Jinja template that made them."""

    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eot_id: int | None
    dtype: str
    tokens: int
    documents: int
    bytes: int
    shards: tuple[ShardEntry, ...]
    row_length: int | None = None
    trained_tokens: int | None = None
    chat_template: str = ""

    def save(self, folder: Path) -> None:
        text = json.dumps(as_json(self), indent=2, default=as_json)
        (folder / MANIFEST).write_text(f"{text}\n", encoding="utf-8")

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
            _check_rows(manifest)
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
                refuse_others(self.folder, [*self.files, *self._mask_files()], MANIFEST)
        self._masks: list[np.ndarray | None] = [None] * len(self.files)  # those behind a URL until they are read
        if self.is_masked and not self._remote:
            self._masks = [self._open_mask(number) for number in range(len(self.files))]
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
            marks += [shard.mask_sha256 for shard in self.manifest.shards if shard.mask_sha256]
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

    def trained(self, start: int, count: int) -> np.ndarray:
        """Return for tokens start .. start + count - 1 of masked rows whether they are trained on, as bool (count,)."""
        assert 0 <= start < start + count <= self.length, (start, count, self.length)
        parts, number = [], bisect_right(self._ends, start)
        while count:
            part = min(count, self._ends[number] - start)
            parts.append(read_bits(self._mask(number), start - self._starts[number], part))
            start, count, number = start + part, count - part, number + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def row_length(self) -> int | None:
        """Tokens in each row of masked rows, of which only some tokens are trained on; None for plain text."""
        return self.manifest.row_length if self.manifest else None

    @property
    def is_masked(self) -> bool:
        return self.row_length is not None

    @property
    def is_remote(self) -> bool:
        return self._remote is not None

    @property
    def bytes(self) -> int:
        """How many bytes the tokens take on disk, with their masks."""
        return self._bytes_of(self.length)

    @property
    def largest_shard_bytes(self) -> int:
        return self._bytes_of(max(end - start for start, end in zip(self._starts, self._ends, strict=True)))

    def _bytes_of(self, tokens: int) -> int:
        return tokens * self.dtype.itemsize + (tokens // 8 if self.is_masked else 0)

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

        def check(shard: ShardEntry) -> None:
            for name, sha256 in ((shard.file, shard.sha256), (mask_of(shard.file), shard.mask_sha256)):
                if sha256 is None:
                    continue
                with self._local_file(name, sha256) as file:
                    found = file_sha256(file)
                if found != sha256:
                    fix = "remove it and start again" if self._remote else "copy or prepare it again"
                    wrong = f"is not what {MANIFEST} says (sha256 differs): it is damaged"
                    raise InputError(f"{self.folder / name} {wrong}; {fix}")

        # hashlib lets other threads run while it works.
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
            for _ in threads.map(check, self.manifest.shards):
                pass

    def _part(self, number: int, start: int, count: int) -> np.ndarray:
        shard, offset = self._shards[number], start - self._starts[number]
        return (self._fetch(number) if shard is None else shard)[offset : offset + count]

    def _fetch(self, number: int) -> np.ndarray:
        assert self._remote is not None
        assert self.manifest is not None
        if self._remote.cache.limit:  # a mapped file takes room on the disk even after it is deleted
            self._shards, self._masks = [None] * len(self.files), [None] * len(self.files)
        entry = self.manifest.shards[number]
        with self._local_file(entry.file, entry.sha256):
            shard = self._shards[number] = self._open(number).tokens
        following = self.manifest.shards[(number + 1) % len(self.files)]
        self._remote.fetch_ahead(following.file, following.sha256)
        return shard

    def _mask(self, number: int) -> np.ndarray:
        if (mask := self._masks[number]) is None:
            assert self.manifest is not None
            entry = self.manifest.shards[number]
            assert entry.mask_sha256 is not None
            with self._local_file(mask_of(entry.file), entry.mask_sha256):
                mask = self._masks[number] = self._open_mask(number)
        return mask

    def _mask_files(self) -> list[Path]:
        return [self.folder / mask_of(file.name) for file in self.files] if self.is_masked else []

    def _open_mask(self, number: int) -> np.ndarray:
        assert self.manifest is not None
        return open_mask(self._mask_files()[number], self.manifest.shards[number].tokens, MANIFEST)

    def _local_file(self, file: str, sha256: str) -> contextlib.AbstractContextManager[Path]:
        return self._remote.at_hand(file, sha256) if self._remote else contextlib.nullcontext(self.folder / file)

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


def _check_rows(manifest: Manifest) -> None:
    """Raise ValueError unless all that belongs to masked rows is there, or nothing."""
    length, trained, masks = manifest.row_length, manifest.trained_tokens, [s.mask_sha256 for s in manifest.shards]
    if not manifest.chat_template and {length, trained, *masks} <= {None}:
        return
    if length is None or trained is None or None in masks:
        raise ValueError("of row_length, trained_tokens and each shard's mask_sha256 some are missing")
    if length < 1 or manifest.tokens < 1 or (manifest.tokens - 1) % length:
        raise ValueError(f"{manifest.tokens} tokens are not rows of row_length {length} and one more")
    if not 0 < trained < manifest.tokens:
        raise ValueError(f"trained_tokens is {trained}, of {manifest.tokens} tokens")


def as_json(part: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, without the optional ones that are not set."""
    values = {f.name: (getattr(part, f.name), f.default) for f in fields(part)}
    return {name: value for name, (value, default) in values.items() if default not in (None, "") or value != default}
