"""Sorts more packed pictures than memory holds: into files by the first bits of their order, and each file alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_BITS = 8
_FEW_BITS = 2  # where memory holds all records
_HELD_BYTES = 64 << 20


class Buckets:
    """Files of records in a folder, which is made. The records of one file all come before those of the next.

    Memory holds some of the records, until `close`.

    Attributes:
        records: how many were added."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.records = 0
        self._folder, self._bits = folder, _BITS
        self._is_written = False
        self._held: list[np.ndarray] = []
        self._size = 0

    def add(self, records: np.ndarray) -> None:
        """Add records with an `order` of uint64. Raises OSError if the disk is full."""
        self.records += len(records)
        self._held.append(records)
        self._size += records.nbytes
        if self._size > _HELD_BYTES:
            self._write()

    def close(self) -> None:
        """Write what is held."""
        if not self._is_written:
            self._bits = _FEW_BITS
        if self._held:
            self._write()

    @property
    def files(self) -> list[Path]:
        """One file for each part of the order. Those without a record are missing."""
        return [self._folder / f"{number:03d}" for number in range(1 << self._bits)]

    def _write(self) -> None:
        records = np.concatenate(self._held)
        number = records["order"] >> np.uint64(64 - self._bits)
        by_file = np.argsort(number, kind="stable")
        ends = np.searchsorted(number[by_file], np.arange(1, len(self.files)))
        for file, chosen in zip(self.files, np.split(by_file, ends), strict=True):
            if len(chosen):
                with file.open("ab") as stream:
                    stream.write(records[chosen].tobytes())
        self._held, self._size, self._is_written = [], 0, True


def in_order(file: Path, record_type: np.dtype) -> np.ndarray:
    """Return the records of a file in their order; of those with the same order, in that in which they were added."""
    records = np.fromfile(file, dtype=record_type) if file.exists() else np.empty(0, dtype=record_type)
    return records[np.argsort(records["order"], kind="stable")]
