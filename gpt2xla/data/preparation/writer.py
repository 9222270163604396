"""Appends token ids to shards, and resumes after an interruption."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpt2xla.data.shard_files.mask_file import MaskWriter, mask_of
from gpt2xla.data.shards import Manifest, ShardEntry
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.files import file_sha256


@dataclass
class Written:
    """What a split holds so far: complete `shards`, and `filled` tokens in the next one."""

    shards: list[ShardEntry]
    filled: int = 0
    documents: int = 0
    bytes: int = 0

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards) + self.filled

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Written:
        return cls(**values | {"shards": [ShardEntry(**shard) for shard in values["shards"]]})


class ShardWriter:
    """Writes one split's shards into `folder`, continuing after `written`; what the last shard holds beyond that is cut off.

    It appends and does not map memory: on a full disk writing raises OSError, but a mapped page would kill the process.
    With `masks`, each shard gets one of its trained tokens; that cannot be continued.

    Attributes:
        path: the shard that is being written. Its tokens begin at byte `data_start`.
        closed: called with each shard that is complete, before the next one begins.
    """

    def __init__(
        self,
        folder: Path,
        dtype: np.dtype,
        shard_size: int,
        written: Written,
        *,
        masks: bool = False,
        closed: Callable[[Path], None] = lambda shard: None,
    ) -> None:
        assert not (masks and written.tokens)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.dtype = dtype
        self.shard_size = shard_size
        self.written = written
        self.trained = 0  # tokens that closed masks select
        self.closed = closed
        self._has_masks = masks
        self._open()

    def add(self, ids: np.ndarray, documents: int, size: int, trained: np.ndarray | None = None) -> None:
        """Append the ids of whole documents, `size` bytes of text, and to the masks which of them are `trained` on."""
        self.written.documents += documents
        self.written.bytes += size
        while len(ids):
            part = ids[: self.shard_size - self.written.filled]
            self._file.write(part.data)
            if self._mask and trained is not None:
                self._mask.add(trained[: len(part)])
                trained = trained[len(part) :]
            self.written.filled += len(part)
            ids = ids[len(part) :]
            if self.written.filled == self.shard_size:
                self._close_shard()
                self._open()

    def save(self) -> None:
        """Bring everything that `written` counts to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, tokenizer: Tokenizer, **optional: Any) -> Manifest:
        """Write manifest and tokenizer beside the shards, and return the manifest. `optional`: its fields of masked rows."""
        if self.written.filled:
            self._close_shard()
        else:
            self._file.close()
            self.path.unlink()
            if self._mask:
                self._mask.close()
                self._mask.file.unlink()
        if self._has_masks:
            optional["trained_tokens"] = self.trained
        manifest = Manifest(
            tokenizer=tokenizer.name,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
            dtype=self.dtype.name,
            tokens=self.written.tokens,
            documents=self.written.documents,
            bytes=self.written.bytes,
            shards=tuple(self.written.shards),
            **optional,
        )
        tokenizer.save(self.folder)
        manifest.save(self.folder)
        return manifest

    def _open(self) -> None:
        self.path = self.folder / f"shard_{len(self.written.shards):06d}.npy"
        self._file: BinaryIO = self.path.open("r+b" if self.written.filled else "w+b")
        self._write_header()
        self.data_start = self._file.tell()
        self._file.truncate(self.data_start + self.written.filled * self.dtype.itemsize)
        self._file.seek(0, os.SEEK_END)
        self._mask = MaskWriter(self.folder / mask_of(self.path.name)) if self._has_masks else None

    def _close_shard(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        entry = ShardEntry(self.path.name, self.written.filled, file_sha256(self.path))
        if self._mask:
            self._mask.close()
            self.trained += self._mask.trained
            entry = replace(entry, mask_sha256=file_sha256(self._mask.file))
        self.written.shards.append(entry)
        self.written.filled = 0
        self.closed(self.path)

    def _write_header(self) -> None:
        """Write the header. numpy pads it, so its length does not depend on the number of tokens."""
        description = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self.written.filled,)}
        np.lib.format.write_array_header_1_0(self._file, header)
