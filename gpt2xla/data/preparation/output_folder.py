"""The folder that a preparation makes. Until all of it is written it lies in `.partial`, under a lock, beside its record."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2xla.data.documents.corpus import InputFile, Position, Split
from gpt2xla.data.preparation.record import RECORD, SPLITS, Record
from gpt2xla.data.preparation.writer import ShardWriter, Written
from gpt2xla.data.shards import MANIFEST, Manifest, TokenStream
from gpt2xla.errors import InputError, RunFailed, user_error
from gpt2xla.processes.exits import is_disk_full
from gpt2xla.processes.locks import locked

_SECONDS_BETWEEN_RECORDS = 2.0


class OutputFolder:
    """A local folder in which a preparation makes `train/` and `test/`.

    Attributes:
        name: what the user called it.
        partial: the folder on this machine in which all is written.
        what: the flag and the name, with which messages begin.
        place: the flag and the folder whose disk must hold what is written.
    """

    def __init__(self, name: str) -> None:
        self.folder = Path(name)
        self.name = str(self.folder)
        self.what = self.place = f"--output-dir {self.folder}"
        self.partial = self.folder / ".partial"
        self._recorded_at = time.monotonic()

    def of(self, split: str) -> str:
        """Return how the user would call a split."""
        return str(self.folder / split)

    def finished(self) -> Record | None:
        """Return the record of a preparation that is complete; None if there is none."""
        return Record.load(self.folder)

    def check(self, split: Split, holds: str) -> None:
        """Raise InputError if a split is not there, or damaged. `holds`: the file that makes it one."""
        if holds == MANIFEST:
            TokenStream(self.folder / split, "--output-dir")
        elif not (self.folder / split / holds).exists():
            raise InputError(f"--output-dir {self.of(split)}: there is no {holds}")

    def manifests(self) -> dict[Split, Manifest]:
        return manifests_in(self.folder)

    @contextlib.contextmanager
    def being_prepared(self, effect: str = "") -> Iterator[Path]:
        """Make `partial`, and hold its lock. It is removed at the end, unless its record says how to resume. `effect`: what
        giving the same command again does after a full disk.

        Raises InputError if the folder cannot be made or another process holds it, and RunFailed if the disk is full."""
        is_new = not self.folder.exists()
        try:
            with in_use(self.partial, self.what, self.place, effect):
                yield self.partial
        finally:
            if is_new and self.folder.exists() and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def refuse_other_splits(self) -> None:
        """Raise InputError if there are splits which a new preparation would have to replace."""
        for split in SPLITS:
            if (self.folder / split).exists():
                raise self._other(split)

    def _other(self, split: str) -> InputError:
        return InputError(f"{self.what}: {split}/ exists already; remove it or choose another")

    def begin(self, record: Record) -> None:
        """Note that a preparation begins."""

    def unfinished(self) -> Record | None:
        """Return the record to resume from; None if there is none."""
        return Record.load(self.partial)

    def restore(self, record: Record, dtype: np.dtype, shard_size: int) -> None:
        """Have in `partial` what the record says of shards that are not complete."""

    def closed(self, split: Split, shard: Path) -> None:
        """Take a shard that is complete."""

    def check_room(self, all: float, shard: int) -> None:
        """Raise InputError if the disk has less room than is needed at least. `all` shards have so many bytes, or one."""
        self._refuse_full(all, "the shards", "--max-tokens")

    def _refuse_full(self, needed: float, what: str, smaller: str) -> None:
        free = shutil.disk_usage(self.partial).free
        if free < needed:
            raise InputError(
                f"{self.place}: {what} will take at least {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free "
                f"there; choose another disk, or {smaller}"
            )

    @property
    def is_record_due(self) -> bool:
        """Whether to save the record after this block. Asked after each."""
        return time.monotonic() - self._recorded_at > _SECONDS_BETWEEN_RECORDS

    def save(self, record: Record, writers: Mapping[Split, ShardWriter]) -> None:
        """Save how far the preparation has come."""
        for writer in writers.values():
            writer.save()
        record.save(self.partial)
        self._recorded_at = time.monotonic()

    def save_last(self, record: Record, writers: Mapping[Split, ShardWriter]) -> None:
        """Save the record of a preparation that has read all of its corpus. It becomes that of the folder."""
        OutputFolder.save(self, record, writers)

    def has(self, split: Split) -> bool:
        """Whether a split lies under its final name already."""
        return (self.folder / split).exists()

    def publish(self) -> dict[Split, Manifest]:
        """Give everything in `partial` its final name, and return the manifests. An interruption does no harm: call it
        again."""
        for split in SPLITS:
            if not self.has(split):
                os.rename(self.partial / split, self.folder / split)
        os.rename(self.partial / RECORD, self.folder / RECORD)
        return self.manifests()


@contextlib.contextmanager
def in_use(partial: Path, what: str, place: str, effect: str) -> Iterator[None]:
    """Make a folder for a preparation, and hold its lock. See `OutputFolder.being_prepared`."""
    with user_error(place):
        partial.mkdir(parents=True, exist_ok=True)
    with user_error(place), locked(partial / "lock", what):
        try:
            yield
        except OSError as error:
            if not is_disk_full(error):
                raise
            fix = f"free some and give the same command again{effect}"
            raise RunFailed(f"{place}: no space left on the disk; {fix}") from None
        finally:
            if not (partial / RECORD).exists():
                shutil.rmtree(partial, ignore_errors=True)


def is_prepared(
    output: OutputFolder,
    settings: dict[str, Any],
    parts: Sequence[InputFile],
    say: Callable[[str], None],
    holds: str = MANIFEST,
) -> bool:
    """Tell whether the output holds this preparation already, and say so. Raises InputError if it holds another one, or
    lacks a part of it. `holds`: the file that makes a folder a split."""
    finished = output.finished()
    if finished is None:
        return False
    finished.check(settings, parts, output.name, complete=True)
    for split in SPLITS:
        try:
            output.check(split, holds)
        except InputError as error:
            fix = f"to prepare it again, remove what is left, including {output.of(RECORD)}"
            raise InputError(f"{error}; {fix}") from None
    say(f"{output.name} is prepared already: nothing to do")
    return True


def manifests_in(folder: Path) -> dict[Split, Manifest]:
    return {split: manifest for split in SPLITS if (manifest := Manifest.load(folder / split))}


def prepare_at_once(
    output: OutputFolder,
    settings: dict[str, Any],
    files: Sequence[InputFile],
    write: Callable[[Path], None],
    say: Callable[[str], None],
    holds: str = MANIFEST,
) -> dict[Split, Manifest]:
    """Prepare the output, unless that is done already. It is not resumed: an interrupted preparation starts again.

    Args:
        settings: the options that decide what is written.
        write: writes a folder for each split into the one that it is given, and may leave others beside them.
        holds: see `is_prepared`.

    Returns the manifests by split. Raises as `is_prepared`, `being_prepared` and `refuse_other_splits` do."""
    if is_prepared(output, settings, files, say, holds):
        return output.manifests()
    with output.being_prepared() as partial:
        if begun := output.unfinished():
            begun.check(settings, files, output.name, complete=bool(begun.parts))
            if begun.parts:  # only the last renames are missing
                return output.publish()
        else:
            output.refuse_other_splits()
        for left in partial.iterdir():  # by a killed preparation
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        write(partial)
        record = Record(settings, [], Position(0, 0), {split: Written([]) for split in SPLITS})
        output.begin(record)
        record.parts = [(file.name, file.size, file.how) for file in files]
        record.position = Position(len(files), 0)
        record.save(partial)
        return output.publish()
