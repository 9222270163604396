"""From documents to a prepared data set: `train/` and `test/`, each with shards, manifest and tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from gpt2xla.data.shards import Manifest, ShardEntry, file_sha256
from gpt2xla.errors import InputError, blaming
from gpt2xla.tokenizer import Tokenizer

_BATCH_DOCUMENTS = 256


def prepare(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    output_dir: Path,
    *,
    seed: int,
    test_fraction: float,
    shard_size: int,
) -> dict[str, Manifest]:
    """Tokenise `documents` into `output_dir/train` and `output_dir/test`.

    Each document goes to `test` with probability `test_fraction`, decided by a hash of the seed and its number: the
    same input gives the same files. It ends with the tokenizer's end-of-text id where there is one. `shard_size`
    is in tokens. Memory stays flat: one shard and one batch of documents. The folders appear under their names only when
    complete.

    Returns:
        The manifests by split.

    Raises:
        InputError: the output exists already, or a split came out empty.
    """
    if not 0 < test_fraction < 1:
        raise InputError(f"--test-fraction {test_fraction}: choose a share between 0 and 1")
    if shard_size < 1:
        raise InputError(f"--shard-size {shard_size}: choose a number of at least 1")
    for split in ("train", "test"):
        if (output_dir / split).exists():
            raise InputError(f"--output-dir {output_dir}: {split}/ exists already; remove it or choose another folder")
    is_new = not output_dir.exists()
    with blaming(f"--output-dir {output_dir}"):
        writers = {
            split: _SplitWriter(output_dir / f".{split}.partial", tokenizer, shard_size) for split in ("train", "test")
        }
    try:
        numbered = enumerate(documents)
        while batch := list(itertools.islice(numbered, _BATCH_DOCUMENTS)):
            for (number, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
                split = "test" if _uniform(f"{seed}/{number}") < test_fraction else "train"
                writers[split].add(ids, len(text.encode()))
        for split, writer in writers.items():
            if writer.tokens == 0:
                raise InputError(f"the {split} split came out empty: give more documents or change --test-fraction")
        manifests = {split: writer.finish() for split, writer in writers.items()}
        for split, writer in writers.items():
            os.rename(writer.folder, output_dir / split)
        return manifests
    finally:  # what a failure left; after success there is nothing under these names
        for writer in writers.values():
            shutil.rmtree(writer.folder, ignore_errors=True)
        if is_new and not any(output_dir.iterdir()):
            output_dir.rmdir()


def read_documents(
    paths: list[Path], suffixes: tuple[str, ...], exclude: tuple[str, ...], split_by: str
) -> Iterator[str]:
    """The documents in text files, and in those files below folders whose name ends in one of `suffixes`, in sorted
    order, but not below folders named in `exclude`. `split_by`: "file", "blank-lines" or "line". Bytes that are not
    UTF-8 become U+FFFD.

    Raises:
        InputError: a path does not exist, or nothing was found.
    """
    found = False
    for file in _text_files(paths, suffixes, exclude):
        with blaming(f"--input {file}"):
            text = file.read_text(encoding="utf-8", errors="replace")
        if split_by == "file":
            documents = [text]
        else:
            documents = text.split("\n\n" if split_by == "blank-lines" else "\n")
        for document in documents:
            if document.strip():
                found = True
                yield document
    if not found:
        raise InputError(f"--input {' '.join(map(str, paths))}: no text in files ending in {', '.join(suffixes)}")


class _SplitWriter:
    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_size: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        folder.mkdir(parents=True)
        self.folder = folder
        self.tokenizer = tokenizer
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self.shard = np.empty(shard_size, dtype=self.dtype)
        self.filled = 0
        self.entries: list[ShardEntry] = []
        self.tokens = self.documents = self.bytes = 0

    def add(self, ids: Iterable[int], size: int) -> None:
        eot = self.tokenizer.eot_id
        tokens = np.fromiter(itertools.chain(ids, () if eot is None else (eot,)), dtype=self.dtype)
        self.documents += 1
        self.bytes += size
        self.tokens += len(tokens)
        while len(tokens):
            part = tokens[: len(self.shard) - self.filled]
            self.shard[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            tokens = tokens[len(part) :]
            if self.filled == len(self.shard):
                self._flush()

    def finish(self) -> Manifest:
        if self.filled:
            self._flush()
        manifest = Manifest(
            tokenizer=self.tokenizer.name,
            tokenizer_sha256=self.tokenizer.sha256,
            vocab_size=self.tokenizer.vocab_size,
            eot_id=self.tokenizer.eot_id,
            dtype=self.dtype.name,
            tokens=self.tokens,
            documents=self.documents,
            bytes=self.bytes,
            shards=tuple(self.entries),
        )
        self.tokenizer.save(self.folder)
        manifest.save(self.folder)
        return manifest

    def _flush(self) -> None:
        file = self.folder / f"shard_{len(self.entries):06d}.npy"
        np.save(file, self.shard[: self.filled])
        self.entries.append(ShardEntry(file.name, self.filled, file_sha256(file)))
        self.filled = 0


def _text_files(paths: list[Path], suffixes: tuple[str, ...], exclude: tuple[str, ...]) -> Iterator[Path]:
    for path in paths:
        if path.is_file():
            yield path
        elif path.is_dir():
            for folder, subfolders, files in os.walk(path):
                subfolders[:] = sorted(name for name in subfolders if name not in exclude)
                yield from (Path(folder, name) for name in sorted(files) if name.endswith(suffixes))
        else:
            raise InputError(f"--input {path}: no such file or folder")


def _uniform(key: str) -> float:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") / 2**64
