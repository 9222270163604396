"""Brings a run from its bucket into the folder that it has on this machine, before anything looks for checkpoints there.

From there on all is as with a run that has only a folder. The bucket is the truth: what the folder holds beyond it is set
aside, unless no other machine has written to the bucket since this folder's run did. Then the folder may be ahead of it, by
what a killed process had not sent yet."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from gpt2xla.checkpoint.bucket.layout import Layout, is_small_file, layout_of
from gpt2xla.checkpoint.folder import EVALUATED
from gpt2xla.checkpoint.run_folder import LATEST, RUN_CONFIG, list_checkpoints, set_aside
from gpt2xla.checkpoint.seal import COMPLETE, find_damage, listed
from gpt2xla.config import GeneralConfig, RunConfig
from gpt2xla.config.paths import BEST_FILE, step_folder
from gpt2xla.errors import InputError, RunFailed, in_one_line, name_copy, user_error
from gpt2xla.files import write_whole
from gpt2xla.logs.console import say
from gpt2xla.logs.sinks import METRICS_FILE
from gpt2xla.processes.exits import is_disk_full
from gpt2xla.processes.lease import Standing, is_own, newest, refuse_if_held
from gpt2xla.processes.locks import in_turn
from gpt2xla.storage import Bucket, is_final

RECORD = ".lease"  # in a run's folder: see `lease.held`
_STEP = re.compile(r"step-\d{8,}")
_ANNOUNCED_BYTES = 200_000_000


class Damaged(Exception):
    """A checkpoint in the bucket is not what its COMPLETE says."""


@contextlib.contextmanager
def bucket_error(bucket: Bucket) -> Iterator[None]:
    """Turn an OSError inside the block into an InputError that names the flag, or, if a later try may succeed, a
    RunFailed."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(
            f"{bucket.option} {bucket.url}: there is no such bucket; make it, or correct the address"
        ) from None
    except OSError as error:
        what = f"{bucket.option} {bucket.url}: {in_one_line(error)}"
        if error.errno is not None:  # of this machine: those of a storage have none
            kind = RunFailed if is_disk_full(error) else InputError
            raise kind(f"{what}; make room for its copy on this machine, or choose another --scratch-dir") from None
        if is_final(error):
            raise InputError(f"{what}; check address and credentials") from None
        raise RunFailed(f"{what}; try again later") from None


def arrive(bucket: Bucket, config: RunConfig) -> tuple[RunConfig, Standing]:
    """Bring the run, and what --resume names. Return the run, in which --resume is a folder on this machine, and what
    `bring` returns. Raises as `bring` does."""
    general, url = config.general, bucket.url
    name_copy(general.folder, url)
    standing, resume = bring(bucket, general), general.resume.rstrip("/")
    if resume in (url, f"{url}/{LATEST}") and (here := list_checkpoints(general.folder)):
        resume = str(here[-1])
    elif resume.startswith(f"{url}/") and _STEP.fullmatch(name := resume[len(url) + 1 :]):
        bring(bucket, general, (int(name[5:]),))
        resume = str(general.folder / name)
    elif resume == f"{url}@best":
        resume = f"{general.folder}@best"
    return dataclasses.replace(config, general=dataclasses.replace(general, resume=resume)), standing


def bring(bucket: Bucket, general: GeneralConfig, steps: tuple[int, ...] = ()) -> Standing:
    """Bring the newest whole checkpoint, the best one, and the run's small files. Every process of a host may call it: one
    does the work, and the others wait.

    Args:
        steps: of further checkpoints to bring. Nothing else is done then.

    Returns the newest lease. Raises InputError if another run holds it and this one is to write, or the bucket cannot be
    used, or no checkpoint in it is whole, or `--resume never` finds some."""
    folder, what = general.folder, f"{bucket.option} {bucket.url}"
    with user_error(f"--scratch-dir {general.scratch_dir}"):
        folder.mkdir(parents=True, exist_ok=True)
    with bucket_error(bucket), in_turn(folder / ".arriving.lock"), contextlib.ExitStack() as holding:
        holding.callback(_clear, folder)
        _clear(folder)  # a killed process may have left something
        record = folder / RECORD  # --do-test only reads, as it does in a folder that a run is using
        standing = newest(bucket) if general.do_test else refuse_if_held(bucket, what, record, say)
        layout = layout_of(bucket)
        if general.resume == "never" and not general.do_test and layout.whole:
            raise InputError(
                f"--resume never: {what} already holds {layout.whole[-1]} of another run; choose another prefix"
            )
        for name in (step_folder(folder, step).name for step in steps):
            try:
                _bring_one(bucket, name, folder)
            except Damaged as damage:
                raise InputError(f"{bucket.option}: {damage}; choose another checkpoint to --resume") from None
        if not steps:
            _bring_run(bucket, layout, folder, is_own(standing, record))
    return standing


def _clear(folder: Path) -> None:
    for partial in folder.glob(".arriving-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _bring_run(bucket: Bucket, layout: Layout, folder: Path, is_ahead: bool) -> None:
    kept: list[str] = []
    here = (path.name for path in reversed(list_checkpoints(folder)) if find_damage(path) is None)
    newest_here = next(here, "")
    if not (is_ahead and newest_here >= max(layout.whole, default="")):
        kept = _bring_newest(bucket, layout, folder)
    if is_ahead:
        return
    for path in list_checkpoints(folder):
        if bucket.read(f"{path.name}/{COMPLETE}") != (path / COMPLETE).read_bytes():
            say(f"{set_aside(path)}: {bucket.url}, which counts, does not hold it")
        elif path.name not in kept:  # the bucket has it
            shutil.rmtree(path)
    found = set()
    for name in {METRICS_FILE, RUN_CONFIG, BEST_FILE, *layout.others}:  # those that every run has may be listed late
        if (content := bucket.read(name)) is not None:
            found.add(name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(folder / name, content)
    for path in [*folder.glob("*.json"), *folder.glob(METRICS_FILE)]:
        if path.name not in found and is_small_file(path.name):
            path.unlink()  # of a run that is no longer in the bucket


def _bring_newest(bucket: Bucket, layout: Layout, folder: Path) -> list[str]:
    """Bring the newest checkpoint that is whole, and the best one. Return their names."""
    damages, brought = [], []
    for name in reversed(layout.whole):
        try:
            _bring_one(bucket, name, folder)
        except Damaged as damage:
            say(f"skipped a checkpoint: {damage}")
            damages.append(str(damage))
        else:
            brought.append(name)
            break
    if damages and not brought:
        raise InputError(
            f"no checkpoint in {bucket.url} is whole ({damages[0]}); delete them there to start from scratch"
        )
    with contextlib.suppress(ValueError, KeyError, TypeError):
        best = step_folder(folder, json.loads(bucket.read(BEST_FILE) or b"")["step"]).name
        if best in layout.whole and best not in brought:
            try:
                _bring_one(bucket, best, folder)
                brought.append(best)
            except Damaged as damage:
                say(f"the best checkpoint is not used: {damage}")
    return brought


def _bring_one(bucket: Bucket, name: str, folder: Path) -> None:
    """Bring a checkpoint unless the same one is here. It appears under its name only when it is whole. Raises Damaged."""
    target, partial = folder / name, folder / f".arriving-{name}"
    complete = bucket.read(f"{name}/{COMPLETE}")
    if complete is None:
        raise Damaged(f"{bucket.url}/{name} has no {COMPLETE}")
    if not (_text(target / COMPLETE) == complete and find_damage(target) is None):
        try:
            entries = listed(complete)
        except ValueError as error:
            raise Damaged(f"{bucket.url}/{name}/{COMPLETE} {error}") from None
        begun, size = time.monotonic(), sum(size for size, _ in entries.values())
        if size > _ANNOUNCED_BYTES:
            say(f"fetching {bucket.url}/{name}: {size / 1e9:.2f} GB")
        partial.mkdir()
        with contextlib.suppress(FileNotFoundError):  # which `find_damage` names
            bucket.fetch({f"{name}/{file}": partial / file for file in entries})
        (partial / COMPLETE).write_bytes(complete)
        if damage := find_damage(partial):
            shutil.rmtree(partial)
            raise Damaged(damage.replace(str(partial), f"{bucket.url}/{name}"))
        if target.exists():
            say(set_aside(target))
        partial.rename(target)
        if size > _ANNOUNCED_BYTES:
            seconds = time.monotonic() - begun
            say(f"fetched {name} in {seconds:.0f} s ({size / 1e6 / seconds:,.0f} MB/s)")
    if (mark := bucket.read(f"{name}/{EVALUATED}")) is not None:
        write_whole(target / EVALUATED, mark)


def _text(file: Path) -> bytes | None:
    with contextlib.suppress(OSError):
        return file.read_bytes()
    return None
