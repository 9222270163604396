"""The file COMPLETE of a checkpoint: size and hash of every other file, which show that it is whole. Knows no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt2xla.files import file_sha256, read_json

COMPLETE = "COMPLETE"


def seal(folder: Path, step: int) -> None:
    """Write COMPLETE: the step, the size and hash of every file, and a hash of these entries."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / COMPLETE
    }
    (folder / COMPLETE).write_text(_sealed({"step": step, "files": files}), encoding="utf-8")


def resealed(folder: Path, name: str, content: bytes) -> str:
    """Return the text of COMPLETE for a copy of a checkpoint in which the file `name` has another content."""
    contents = read_json(folder / COMPLETE)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return _sealed({"step": contents["step"], "files": contents["files"] | {name: entry}})


def step_of(folder: Path) -> int:
    """Return the step at which a checkpoint was saved; 0 for any other model folder."""
    try:
        return int(read_json(folder / COMPLETE)["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def listed(complete: bytes) -> dict[str, tuple[int, str]]:
    """Return size in bytes and SHA-256 of each file that the content of COMPLETE lists, by name. If it is damaged, this
    raises ValueError, which says how."""
    files: dict[str, tuple[int, str]] = {}
    try:
        contents = json.loads(complete.decode("utf-8-sig"))
        is_whole = contents.pop("sha256") == _sha256(contents)
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in contents["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise ValueError("is damaged")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise ValueError("names a file outside of its folder")
    return files


def part_of(complete: bytes, names: Iterable[str]) -> bytes:
    """Return the content of COMPLETE for a copy that has only the files `names`."""
    contents = json.loads(complete.decode("utf-8-sig"))
    return _sealed({"step": contents["step"], "files": {name: contents["files"][name] for name in names}}).encode()


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, by the sizes and hashes in COMPLETE; None if it is whole."""
    try:
        expected = listed((folder / COMPLETE).read_bytes())
    except FileNotFoundError:
        return f"{folder} is not a finished checkpoint: it has no file {COMPLETE}"
    except OSError:
        return f"{folder / COMPLETE} is damaged"
    except ValueError as error:
        return f"{folder / COMPLETE} {error}"
    for name, (size, sha256) in expected.items():
        file = folder / name
        try:
            is_there = file.is_file()
        except OSError:
            return f"{folder / COMPLETE} names a file that cannot exist"
        if not is_there:
            return f"{file} is missing"
        if file.stat().st_size != size or file_sha256(file) != sha256:
            return f"{file} is damaged: its contents have changed since it was saved"
    return None


def _sealed(contents: dict[str, Any]) -> str:
    return json.dumps(contents | {"sha256": _sha256(contents)}, indent=2) + "\n"


def _sha256(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
