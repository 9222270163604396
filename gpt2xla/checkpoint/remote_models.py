"""Models behind URLs (`gs://`, `s3://`, `hf://`, whatever fsspec knows), fetched to this machine and then read as any other.

A URL names a run, which means its newest whole checkpoint; URL@best, its best one; a checkpoint; a Hugging Face folder; or
a file, to which a config.json beside it belongs. Each version of a model has a folder of its own. Files appear in it under
their names when they are whole, so a killed process leaves nothing that passes for a model, and whoever comes next
fetches only the rest. A lock lets one of several processes on a host fetch while the others wait. A folder for which
nobody has asked in a week is deleted when another one is fetched.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from gpt2xla.checkpoint.folder import EVALUATED, SHARDS, TRAINING_STATE
from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.checkpoint.run_folder import LATEST, RUN_CONFIG
from gpt2xla.checkpoint.seal import COMPLETE, listed, part_of
from gpt2xla.config.paths import AT_BEST, BEST_FILE, best_in, is_url, step_folder
from gpt2xla.errors import InputError, RunFailed, counted, name_copy
from gpt2xla.files import file_sha256, folder_name, write_whole
from gpt2xla.logs.console import say
from gpt2xla.logs.sinks import METRICS_FILE
from gpt2xla.processes.exits import is_disk_full
from gpt2xla.processes.locks import in_turn
from gpt2xla.storage import Bucket

COPIES = Path("~/.cache/gpt2xla/models")
_KEPT_SECONDS = 7 * 24 * 3600.0  # since somebody asked for it, who has long opened it
_SAID_FROM = 200e6  # bytes: what takes a while is shown
_STEP = re.compile(r"step-(\d{8,})")
_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class _Model:
    """A model behind a URL, as it is now.

    Attributes:
        bucket: the folder that holds its files.
        files: those to fetch, with size in bytes and SHA-256 ("" if that is not known), by name.
        version: differs for each content of these files.
        texts: further small files, by name.
        complete: of our own checkpoint, the content of COMPLETE.
        file: the model's name in its folder; "" if it is the folder.
    """

    bucket: Bucket
    files: dict[str, tuple[int, str]]
    version: bytes
    texts: dict[str, bytes] = field(default_factory=dict)
    complete: bytes = b""
    file: str = ""

    @property
    def url(self) -> str:
        return f"{self.bucket.url}/{self.file}".rstrip("/")


def fetched(url: str, option: str, *, with_training: bool) -> Path:
    """Return a copy on this machine of the model that a URL names: its folder or file. It is fetched unless it is here.

    Args:
        option: which gave the URL, for messages.
        with_training: fetch all of our own checkpoint, so that it can be resumed. Otherwise the optimizer's state is left
            out, two thirds of it, also in the copy's COMPLETE.

    Raises:
        InputError: there is no whole model at the URL, or it may not be read.
        RunFailed: it could not be fetched, or changes all the time."""
    missing = ""
    for _ in range(2):
        try:
            model = _find(url.rstrip("/"), option, with_training)
        except OSError as error:
            raise InputError(f"{option} {error}; check address and credentials") from None
        try:
            return _at_hand(model)
        except FileNotFoundError:  # replaced meanwhile, or deleted, as a run does with its old checkpoints
            missing = next(iter(model.files.keys() - model.bucket.files()), "")
        except OSError as error:
            if is_disk_full(error):
                fix = f"free some space, of which {COPIES} may hold some, and start again"
                raise RunFailed(f"{option} {url}: the disk is full; {fix}") from None
            if error.errno is not None:
                fix = "let HOME name a folder that can be written"
                raise InputError(f"{COPIES} cannot keep the models of URLs: {error}; {fix}") from None
            kind = InputError if isinstance(error, PermissionError) else RunFailed
            raise kind(f"{option} {error}; start again, and only the rest is fetched") from None
    if missing and model.complete:
        what = f"{model.bucket.url}/{missing} is missing although {COMPLETE} lists it"
        raise InputError(f"{option} {what}; name another checkpoint, or upload it again")
    raise RunFailed(f"{option} {url} changed while it was fetched; try again when its upload is done")


def _find(url: str, option: str, with_training: bool) -> _Model:
    """Return the model that the URL names. Raises InputError if there is none, and OSError if the storage fails."""
    if url.endswith(AT_BEST):  # on the Hugging Face hub it may be a branch
        run = Bucket(url.removesuffix(AT_BEST), option)
        if (text := run.read(BEST_FILE)) is not None:
            return _best(run, text, with_training)
    bucket = Bucket(url, option)
    entries = bucket.entries()
    parent, _, name = url.rpartition("/")
    if "" in entries:
        if name != LATEST:
            return _file(bucket, *entries[""])
        return _newest(run := Bucket(parent, option), run.entries(), with_training)
    if model := _checkpoint(bucket, with_training):
        return model
    if (_STEP.fullmatch(name) and entries) or TRAINING_STATE in entries:
        fix = "it is uploaded last, so wait for it, or name another checkpoint"
        raise InputError(f"{option} {url} is not a finished checkpoint: it has no {COMPLETE}; {fix}")
    if "config.json" in entries:
        return _hugging_face(bucket, entries)
    if url.endswith(AT_BEST) and not entries:
        why = "--keep-best was not set, or no validation has been uploaded yet"
        raise InputError(
            f"{option} {url}: there is no {run.url}/{BEST_FILE}: {why}; {run.url} alone means the newest one"
        )
    return _newest(bucket, entries, with_training)


def _newest(run: Bucket, entries: dict[str, tuple[int, str]], with_training: bool) -> _Model:
    """Return the newest finished checkpoint of a run. What the store lists late, the object `latest` names."""
    names = {name.rstrip("/") for name in entries if name.endswith("/")}
    names.add((run.read(LATEST) or b"").decode("utf-8", "replace").strip())
    steps = [(int(found[1]), name) for name in names if (found := _STEP.fullmatch(name))]
    for _, name in sorted(steps, reverse=True):
        if model := _checkpoint(Bucket(f"{run.url}/{name}", run.option), with_training):
            return model
    what = f"{run.option} {run.url}"
    if steps or {RUN_CONFIG, METRICS_FILE} & entries.keys():
        raise InputError(f"{what} holds no finished checkpoint yet; wait until its run has uploaded one")
    if weights := sorted(name for name in entries if name.endswith(_WEIGHTS)):
        raise InputError(f"{what} has no config.json; give the file itself, such as {run.url}/{weights[0]}")
    if entries:
        raise InputError(f"{what} holds no model; name a run, a checkpoint, a Hugging Face folder or a model's file")
    raise InputError(f"{what}: nothing is there; check the address")


def _best(run: Bucket, text: bytes, with_training: bool) -> _Model:
    try:
        name = step_folder(Path(), best_in(json.loads(text))[0]).name
    except ValueError:
        raise InputError(f"{run.option} {run.url}/{BEST_FILE} is damaged; name a checkpoint instead of @best") from None
    if model := _checkpoint(Bucket(f"{run.url}/{name}", run.option), with_training):
        return model
    what = f"{run.option} {run.url}{AT_BEST}: {BEST_FILE} names {name}"
    raise InputError(f"{what}, which is not there, or not whole; name another checkpoint")


def _checkpoint(bucket: Bucket, with_training: bool) -> _Model | None:
    """Return our own checkpoint in the folder; None if there is no finished one."""
    if (complete := bucket.read(COMPLETE)) is None:
        return None
    try:
        files = listed(complete)
    except ValueError as error:
        what = f"{bucket.option} {bucket.url}/{COMPLETE} {error}"
        raise InputError(f"{what}; name another checkpoint, or upload it again") from None
    if not with_training:
        files = {name: file for name, file in files.items() if name.split("/")[0] not in (TRAINING_STATE, SHARDS)}
        return _Model(bucket, files, complete, complete=complete)
    mark = bucket.read(EVALUATED)
    return _Model(bucket, files, complete, {} if mark is None else {EVALUATED: mark}, complete)


def _hugging_face(bucket: Bucket, entries: dict[str, tuple[int, str]]) -> _Model:
    """Return the Hugging Face model in a folder with these entries."""
    for folder in {pattern.partition("/")[0] for pattern in hf.SMALL_FILES if "/" in pattern}:
        if f"{folder}/" in entries:
            entries = entries | {name: (size, "") for name, size in bucket.files(folder).items()}
    names = hf.files_of_model(entries)
    version = repr([(name, *entries[name]) for name in names]).encode()
    return _Model(bucket, {name: (entries[name][0], "") for name in names}, version)


def _file(bucket: Bucket, size: int, version: str) -> _Model:
    """Return a model in one file. Its folder, which may hold anything, is not listed."""
    parent, _, name = bucket.url.rpartition("/")
    beside = Bucket(parent, bucket.option)
    texts: dict[str, bytes] = {}
    for small in hf.SMALL_FILES:
        if "*" in small or (small != "config.json" and not texts):  # to which the others belong
            continue
        with contextlib.suppress(PermissionError):  # S3's answer for what is not there, to those who may not list
            if (text := beside.read(small)) is not None:
                texts[small] = text
    texts.pop(name, None)
    about = repr([name, size, version, *texts.items()]).encode()
    return _Model(beside, {name: (size, "")}, about, texts, file=name)


def _at_hand(model: _Model) -> Path:
    """Return the model's copy, after fetching what is missing. Raises FileNotFoundError if it is no longer at its URL."""
    root, url = COPIES.expanduser(), model.bucket.url
    parent, _, name = url.rpartition("/")
    place = root / folder_name(url, model.version)
    folder = place / (re.sub(r"[^A-Za-z0-9._@=-]+", "-", name).strip(".") or "model")
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(place)
    with in_turn(place / ".lock"):
        if missing := [name for name, (size, _) in model.files.items() if not _is_there(folder / name, size)]:
            _remove_unused(root)
            _fetch(model, missing, place / ".partial", folder)
        for name, text in (model.texts | _sealed(model, folder)).items():
            if not (folder / name).is_file() or (folder / name).read_bytes() != text:
                write_whole(folder / name, text)
    name_copy(place, parent if is_url(parent) else url)
    name_copy(folder, url)
    return folder / model.file


def _remove_unused(root: Path) -> None:
    for lock in root.glob("*/.lock"):  # what else lies there is not ours
        with contextlib.suppress(OSError):  # another process removes it too
            if time.time() - lock.parent.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(lock.parent)


def _is_there(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _sealed(model: _Model, folder: Path) -> dict[str, bytes]:
    """Return COMPLETE of the copy of our own checkpoint: it lists the files that are here."""
    if not model.complete:
        return {}
    files = listed(model.complete)
    here = [name for name, (size, _) in files.items() if _is_there(folder / name, size)]
    return {COMPLETE: model.complete if len(here) == len(files) else part_of(model.complete, here)}


def _fetch(model: _Model, names: list[str], partial: Path, folder: Path) -> None:
    """Bring files to `partial` and, once they are all whole, to `folder`."""
    hashes = {name: sha256 for name in names if (sha256 := model.files[name][1])}
    there = [name for name in hashes if _is_there(partial / name, model.files[name][0])]  # of a killed process
    rest = [name for name in names if name not in there or file_sha256(partial / name) != hashes[name]]
    size, start = sum(model.files[name][0] for name in rest), time.monotonic()
    if size >= _SAID_FROM:
        say(f"fetching {model.bucket.url}: {counted(len(rest), 'file')}, {size / 1e9:.2f} GB, to {folder}", error=True)
    found = model.bucket.fetch({name: partial / name for name in rest})
    for name in sorted(hashes.keys() & found.keys()):
        if found[name] != hashes[name]:
            (partial / name).unlink()
            what = f"{model.bucket.option} {model.bucket.url}/{name} is damaged: it is not what {COMPLETE} says"
            raise InputError(f"{what} (sha256 differs); name another checkpoint, or upload it again")
    if not model.complete and _find(model.url, model.bucket.option, False).version != model.version:
        shutil.rmtree(partial)
        raise FileNotFoundError(model.bucket.url)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, folder / name)
    shutil.rmtree(partial)
    if size >= _SAID_FROM:
        seconds = time.monotonic() - start
        say(f"fetched in {seconds:.0f} s ({size / 1e6 / seconds:,.0f} MB/s)", error=True)
