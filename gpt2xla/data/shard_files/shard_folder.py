"""Finds the shards of a split in a folder without a manifest."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from pathlib import Path

from gpt2xla.data.shard_files.mask_file import MASK_SUFFIX
from gpt2xla.data.shard_files.shard_format import SUFFIXES
from gpt2xla.errors import InputError
from gpt2xla.files import read_json

# Endings of files that nothing reads, so that they would silently be left out.
_UNFINISHED = re.compile(
    r"\.(npy|bin|ds)\.(gz|zst|xz|bz2|lz4|zip|tar|part|partial|incomplete|crdownload|aria2|tmp)$", re.I
)
_SPLITS = {"train": r"train|training", "val": r"val|valid|validation|dev|eval", "test": r"test|testing|holdout|heldout"}


def shards_of(folder: Path, option: str) -> tuple[list[Path], list[str]]:
    """Return the shards that `option` reads, in the order of their names, and notes about the choice. Hidden files are none.
    Raises InputError if it is unclear whether some files belong to them."""
    seen = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    if unfinished := [file for file in seen if _UNFINISHED.search(file.name)]:
        raise InputError(f"{unfinished[0]} is compressed or incomplete, and would be left out; decompress or remove it")
    if masks := [file for file in seen if file.suffix.lower() == MASK_SUFFIX]:
        fix = "copy that too, or move the masks away to train on all tokens"
        raise InputError(
            f"{masks[0]} is a shard's mask, which cannot be read without the manifest.json of its folder; {fix}"
        )
    files = [file for file in seen if file.suffix.lower() in SUFFIXES and not file.is_dir()]
    _refuse_litdata(folder)
    _refuse_twins(files)
    return _of_split(folder, files, option)


def refuse_others(folder: Path, named: list[Path], manifest: str) -> None:
    """Raise InputError if a folder holds shards, or masks of shards, that its manifest does not name."""
    known = {file.name for file in named}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in (*SUFFIXES, MASK_SUFFIX) and not file.name.startswith(".") and file.name not in known:
            raise InputError(f"{file} is not named in {manifest}, and would be left out; move it out of the folder")


def _refuse_litdata(folder: Path) -> None:
    index, is_litdata = folder / "index.json", False
    with contextlib.suppress(OSError, ValueError, TypeError):  # there is none, or it is another one
        is_litdata = "chunks" in read_json(index)
    if is_litdata:
        raise InputError(f"{index} makes its folder a litdata data set: not supported; prepare its text instead")


def _refuse_twins(files: list[Path]) -> None:
    by_stem: dict[str, Path] = {}
    by_content: dict[tuple[int, int], Path] = {}
    for file in files:
        if (other := by_stem.setdefault(file.stem, file)) is not file:
            raise InputError(f"{other} and {file.name} may be the same tokens in two formats; move one elsewhere")
        if file.exists():
            status = file.stat()
            if (other := by_content.setdefault((status.st_dev, status.st_ino), file)) is not file:
                raise InputError(f"{other} and {file.name} are links to one file; remove one")


def _of_split(folder: Path, files: list[Path], option: str) -> tuple[list[Path], list[str]]:
    """Choose the option's split by name if a folder holds several, as those of llm.c and nanoGPT do."""
    splits = _splits(folder, files)
    wanted = ["val", "test"] if option == "--valid-dir" else ["train"]
    if len(splits) < 2:
        if splits and (name := next(iter(splits))) and name not in wanted:
            return files, [f"note: {option} {folder} reads shards named {name} ({_some(files)})"]
        return files, []
    if set(splits) == {"", "train"}:
        return files, []
    if "" in splits or not (name := next((name for name in wanted if name in splits), "")):
        named = ", ".join(f"{name or 'no split'} ({_some(chosen)})" for name, chosen in splits.items())
        held = f"shards of several splits by their names: {named}"
        raise InputError(f"{option} {folder} holds {held}; give each its own folder")
    others = ", ".join(f"{other} ({_some(chosen)})" for other, chosen in splits.items() if other != name)
    return splits[name], [f"note: {option} {folder} reads shards named {name} ({_some(splits[name])}), not {others}"]


def _some(files: list[Path]) -> str:
    return files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _splits(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Return the shards by the split in their names, "" if there is none. A word that all names share says nothing."""
    named = [
        {split for split, words in _SPLITS.items() if re.search(rf"(?<![a-z])({words})(?![a-z])", file.stem.lower())}
        for file in files
    ]
    common = set.intersection(*named) if named else set()
    splits = defaultdict(list)
    for file, names in zip(files, named, strict=True):
        telling = names - common or names
        if len(telling) > 1 and any(names != named[0] for names in named):
            raise InputError(f"{file} is of two splits by its name ({', '.join(sorted(telling))}); rename it")
        splits[telling.pop() if len(telling) == 1 else ""].append(file)
    return dict(splits)
