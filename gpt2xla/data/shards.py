"""A split on disk: a folder of token shards, read as one stream of tokens without loading it.

Formats: 1-D `.npy` (ours, with `manifest.json`; or plain), llm.c `.bin` (header of 256 int32, then uint16 or
uint32) and nanoGPT `.bin` (uint16 only). Shards follow one another in the order of their names.
"""

from __future__ import annotations

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

from gpt2xla.data.remote import DEFAULT_CACHE, Cache, RemoteFolder, is_url
from gpt2xla.errors import InputError, blaming
from gpt2xla.json_file import read_json

MANIFEST = "manifest.json"
LLMC_DTYPES = {20240520: "<u2", 20240801: "<u4"}  # by the magic number of the header
LLMC_HEADER_BYTES = 256 * 4
_SAMPLE_BLOCKS, _SAMPLE_TOKENS = 16, 4096


@dataclass(frozen=True)
class ShardEntry:
    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a split: what it was made of and with, to match models and continued runs to it."""

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
        """The folder's manifest, or None where there is none. Raises InputError for one that is not ours."""
        file = folder / MANIFEST
        if not file.exists():
            return None
        try:
            values = read_json(file)
            shards = tuple(ShardEntry(**entry) for entry in values.pop("shards"))
            manifest = cls(**values, shards=shards)
            _check_types(manifest)
            for shard in shards:
                _check_types(shard)
            if manifest.dtype not in ("uint16", "uint32"):
                raise ValueError(f"dtype is {manifest.dtype[:80]!r}")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{file} is not a manifest of token shards ({error}); prepare the data again") from None
        if any(Path(shard.file).name != shard.file or shard.file in ("", "..") for shard in shards):
            raise InputError(f"{file} names a shard outside of its folder; prepare the data again")
        return manifest


class TokenStream:
    """All tokens of a split as one sequence. Shards of a local folder are memory-mapped at once; those behind a URL are
    fetched when they are first read (`remote.py`).

    Attributes:
        name: the folder or URL, as the user wrote it.
        folder: where manifest and tokenizer lie on this machine.
        length: number of tokens.
        dtype: that of what `read` returns.
        manifest: the split's manifest, or None for a plain folder.
        fingerprint: changes when the tokens do (by manifest), or at least their number (plain folders).

    Raises:
        InputError: the folder is missing or empty, a shard is damaged or does not agree with the manifest.
    """

    def __init__(self, folder: str | Path, option: str = "--train-dir", cache: Cache = DEFAULT_CACHE) -> None:
        self.name, self.option = str(folder), option
        self._remote = RemoteFolder(self.name, option, cache, MANIFEST) if is_url(self.name) else None
        self.folder = self._remote.folder if self._remote else Path(folder)
        with blaming(f"{option} {folder}"):  # no permission, or a name that is too long
            if not self.folder.is_dir():
                raise InputError(f"{option} {folder}: no such folder; make one with scripts/prepare_text.py")
            self.manifest = Manifest.load(self.folder)
        if self.manifest:
            self.files = [self.folder / shard.file for shard in self.manifest.shards]
        else:
            self.files = _of_split(sorted([*self.folder.glob("*.npy"), *self.folder.glob("*.bin")]), option)
        if not self.files:
            raise InputError(f"{option} {folder}: holds no .npy or .bin shards; make some with scripts/prepare_text.py")
        self._shards: list[np.ndarray | None]  # a remote one is None until it is read
        if self._remote and self.manifest:
            self._shards = [None] * len(self.files)
            lengths, dtypes = [shard.tokens for shard in self.manifest.shards], {np.dtype(self.manifest.dtype)}
        else:
            shards = [self._map(number) for number in range(len(self.files))]
            self._shards = [*shards]
            lengths, dtypes = [len(shard) for shard in shards], {shard.dtype for shard in shards}
        # Plain lists: looking up one position in them is several times faster than in an array.
        self._ends = list(itertools.accumulate(lengths))
        self._starts = [0, *self._ends[:-1]]
        self.length = self._ends[-1]
        if self.manifest and self.manifest.tokens != self.length:
            raise InputError(
                f"{self.folder / MANIFEST} promises {self.manifest.tokens} tokens but its shards hold {self.length}; "
                "prepare the data again"
            )
        self.dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.int64)
        self.fingerprint = self._fingerprint(lengths)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1, across shard borders; where they lie in one shard, no copy."""
        assert 0 <= start <= self.length - count, (start, count, self.length)
        number = bisect_right(self._ends, start) if count else 0
        part = self._part(number, start, count)
        if len(part) == count:
            return part
        out = np.empty(count, dtype=self.dtype)
        filled = 0
        while filled < count:
            part = self._part(number, start + filled, count - filled)
            out[filled : filled + len(part)] = part
            filled += len(part)
            number += 1
        return out

    @property
    def is_remote(self) -> bool:
        return self._remote is not None

    @property
    def bytes(self) -> int:
        """What the tokens take on disk."""
        return self.length * self.dtype.itemsize

    @property
    def largest_shard_bytes(self) -> int:
        return max(end - start for start, end in zip(self._starts, self._ends, strict=True)) * self.dtype.itemsize

    def file_of(self, position: int) -> Path:
        return self.files[bisect_right(self._ends, position)]

    def check_ids(self, vocab_size: int) -> None:
        """Refuse a split whose ids do not fit the model: by the manifest, and by a sample of each shard that is here (all
        are checked as they are read). Raises InputError."""
        largest, file = max(
            ((int(_sample(shard).max(initial=0)), file) for shard, file in zip(self._shards, self.files, strict=True)
             if shard is not None), default=(0, self.folder),
        )  # fmt: skip
        if self.manifest:
            if largest >= self.manifest.vocab_size:
                raise InputError(
                    f"{file} holds id {largest}, but {MANIFEST} says that ids lie below {self.manifest.vocab_size}: it is "
                    "damaged; copy or prepare it again"
                )
            largest, file = self.manifest.vocab_size - 1, self.folder / MANIFEST
        if largest >= vocab_size:
            raise InputError(
                f"--vocab-size {vocab_size} is too small for {file}, which holds ids up to {largest}; "
                f"use at least {largest + 1}"
            )

    def verify(self) -> None:
        """Compare every shard with the hash in its manifest, some at a time. Raises InputError, naming the first that
        differs, or where there is no manifest."""
        if not self.manifest:
            raise InputError(
                f"--verify-data: {self.name} has no {MANIFEST} with hashes to check; prepare it again or leave the flag out"
            )

        def check(number_and_shard: tuple[int, ShardEntry]) -> None:
            number, shard = number_and_shard
            if file_sha256(self._local_file(number)) != shard.sha256:
                raise InputError(
                    f"{self.files[number]} is not what {MANIFEST} says (sha256 differs): it is damaged; "
                    f"{'remove' if self._remote else 'copy or prepare'} it {'and start' if self._remote else ''} again"
                )

        # hashlib lets other threads run while it works.
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
            for _ in threads.map(check, enumerate(self.manifest.shards)):
                pass

    def _part(self, number: int, start: int, count: int) -> np.ndarray:
        offset = start - self._starts[number]
        return self._shard(number)[offset : offset + count]

    def _shard(self, number: int) -> np.ndarray:
        shard = self._shards[number]
        return self._fetch(number) if shard is None else shard

    def _fetch(self, number: int) -> np.ndarray:
        assert self._remote is not None
        assert self.manifest is not None
        shards = self.manifest.shards
        if self._remote.cache.limit:  # what is mapped takes room on the disk even when it is deleted
            self._shards = [None] * len(self.files)
        self._remote.use(shards[number].file, shards[number].sha256)
        shard = self._shards[number] = self._map(number)
        following = shards[(number + 1) % len(shards)]
        self._remote.fetch_ahead(following.file, following.sha256)
        return shard

    def _local_file(self, number: int) -> Path:
        if self._remote and self.manifest:
            shard = self.manifest.shards[number]
            return self._remote.fetch(shard.file, shard.sha256)
        return self.files[number]

    def _map(self, number: int) -> np.ndarray:
        file, manifest = self.files[number], self.manifest
        shard = _map_shard(file)
        if manifest:
            tokens = manifest.shards[number].tokens
            if len(shard) != tokens or shard.dtype != np.dtype(manifest.dtype):
                raise InputError(
                    f"{file} holds {len(shard)} {shard.dtype} tokens but {MANIFEST} says {tokens} {manifest.dtype}; "
                    "prepare the data again"
                )
        return shard

    def _fingerprint(self, lengths: list[int]) -> str:
        if self.manifest:
            parts: list = [shard.sha256 for shard in self.manifest.shards]
        else:
            parts = [(file.name, length) for file, length in zip(self.files, lengths, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _check_types(part: Manifest | ShardEntry) -> None:
    for name, kind in get_type_hints(type(part)).items():
        plain = tuple if get_origin(kind) is tuple else kind
        if not isinstance(getattr(part, name), plain):
            raise ValueError(f"{name} is {repr(getattr(part, name))[:80]}")


def _of_split(files: list[Path], option: str) -> list[Path]:
    """Where one folder holds both splits, as llm.c's and nanoGPT's do, only the files named after the option's split."""
    train, valid = ([file for file in files if word in file.name] for word in ("train", "val"))
    if not train or not valid:
        return files
    return valid if option == "--valid-dir" else train


def file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _map_shard(file: Path) -> np.ndarray:
    try:
        # Not np.load, which would take a zip of arrays or a pickle for what it is.
        shard = np.lib.format.open_memmap(file, mode="r") if file.suffix == ".npy" else _map_bin(file)
    except FileNotFoundError:
        raise InputError(f"{file} is missing although {MANIFEST} names it; prepare the data again") from None
    except Exception as error:  # numpy reads headers with Python's parser, which fails in many ways
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{file} cannot be read as a shard ({reason}); it may be cut short: copy or prepare it again"
        ) from None
    if shard.ndim != 1 or shard.dtype.kind not in "ui":
        raise InputError(f"{file} holds {shard.dtype} of shape {shard.shape}; a shard is one row of integer ids")
    return np.asarray(shard)  # slicing an np.memmap costs ten times as much


def _map_bin(file: Path) -> np.ndarray:
    size = file.stat().st_size
    header = np.fromfile(file, dtype="<i4", count=3)
    if len(header) == 3 and header[0] in LLMC_DTYPES:
        shard = np.memmap(file, dtype=LLMC_DTYPES[header[0]], mode="r", offset=LLMC_HEADER_BYTES)
        if len(shard) != header[2]:
            raise ValueError(f"its header promises {header[2]} tokens but {len(shard)} follow")
        return shard
    if size == 0 or size % 2:
        raise ValueError(f"{size} bytes are not whole uint16 ids")
    return np.memmap(file, dtype="<u2", mode="r")


def _sample(shard: np.ndarray) -> np.ndarray:
    starts = np.linspace(0, max(0, len(shard) - _SAMPLE_TOKENS), _SAMPLE_BLOCKS, dtype=np.int64)
    return np.concatenate([shard[start : start + _SAMPLE_TOKENS] for start in np.unique(starts)])
