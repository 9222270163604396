"""The folder that a preparation makes. Until all of it is written it lies in `.partial`, under a lock, beside its record."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt2xla.data.documents.corpus import InputFile, Position, Split
from gpt2xla.data.preparation.record import RECORD, SPLITS, Record, check_shards, is_prepared, manifests_of
from gpt2xla.data.preparation.writer import Written
from gpt2xla.data.shards import Manifest
from gpt2xla.errors import InputError, RunFailed, user_error
from gpt2xla.processes.exits import is_disk_full
from gpt2xla.processes.locks import locked


def prepare_at_once(
    output_dir: Path,
    settings: dict[str, Any],
    files: Sequence[InputFile],
    write: Callable[[Path], None],
    say: Callable[[str], None],
    check: Callable[[Path], None] = check_shards,
) -> dict[Split, Manifest]:
    """Prepare `output_dir`, unless that is done already. It is not resumed: an interrupted preparation starts again.

    Args:
        settings: the options that decide what is written.
        write: writes a folder for each split into the one that it is given, and may leave others beside them.
        check: see `is_prepared`.

    Returns the manifests by split. Raises as `is_prepared`, `being_prepared` and `refuse_other_splits` do."""
    if is_prepared(output_dir, settings, files, say, check):
        return manifests_of(output_dir)
    with being_prepared(output_dir) as partial:
        if written := Record.load(partial):  # only the last renames are missing
            written.check(settings, files, partial, complete=True)
            return publish(partial, output_dir)
        refuse_other_splits(output_dir)
        for left in partial.iterdir():  # by a killed preparation
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        write(partial)
        described = [(file.name, file.size, file.how) for file in files]
        Record(settings, described, Position(len(files), 0), {split: Written([]) for split in SPLITS}).save(partial)
        return publish(partial, output_dir)


@contextlib.contextmanager
def being_prepared(output_dir: Path, effect: str = "") -> Iterator[Path]:
    """Make `.partial` in `output_dir`, and hold its lock. It is removed at the end, unless its record says how to resume.
    `effect`: what giving the same command again does after a full disk.

    Raises InputError if the folder cannot be made or another process holds it, and RunFailed if the disk is full."""
    what = f"--output-dir {output_dir}"
    partial, is_new = output_dir / ".partial", not output_dir.exists()
    with user_error(what):
        partial.mkdir(parents=True, exist_ok=True)
    with user_error(what), locked(partial / "lock", what):
        try:
            yield partial
        except OSError as error:
            if not is_disk_full(error):
                raise
            fix = f"free some and give the same command again{effect}"
            raise RunFailed(f"{what}: no space left on the disk; {fix}") from None
        finally:
            if not (partial / RECORD).exists():
                shutil.rmtree(partial, ignore_errors=True)
                if is_new and not any(output_dir.iterdir()):
                    output_dir.rmdir()


def refuse_other_splits(output_dir: Path) -> None:
    """Raise InputError if there are splits which a new preparation would have to replace."""
    for split in SPLITS:
        if (output_dir / split).exists():
            raise InputError(f"--output-dir {output_dir}: {split}/ exists already; remove it or choose another")


def publish(partial: Path, output_dir: Path) -> dict[Split, Manifest]:
    """Give everything in `partial` its final name, and return the manifests. An interruption does no harm: call it again."""
    for split in SPLITS:
        if not (output_dir / split).exists():
            os.rename(partial / split, output_dir / split)
    os.rename(partial / RECORD, output_dir / RECORD)
    return manifests_of(output_dir)
