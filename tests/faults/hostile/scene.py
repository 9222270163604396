"""Files for the cases to spoil, and the commands that open them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2xla.files import file_sha256

DEEP = "[" * 100_000
WAYS = ("system", "exec", "popen", "open")  # to run code on unpickling
FORMATS: dict[str, Callable[[object, Path], None]] = {
    "zip": torch.save,
    "legacy": lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False),
    "pickle": lambda value, file: file.write_bytes(pickle.dumps(value)),
    "pickle protocol 0": lambda value, file: file.write_bytes(pickle.dumps(value, protocol=0)),
}


@dataclass
class Scene:
    """A test's folder, with copies of good files.

    Attributes:
        checkpoint: of a run of 20 steps.
        train, valid: folders of shards, with manifests.
        sentinel: a file that exists once a stranger's code has run.
    """

    folder: Path
    checkpoint: Path
    train: Path
    valid: Path
    sentinel: Path

    def pretrain(self, *flags: object) -> list[str]:
        data = ["--train-dir", self.train, "--valid-dir", self.valid]
        small = ["--vocab-size", 257, "--seq-length", 16, "--d-model", 8, "--num-layers", 1, "--num-heads", 1]
        few = ["--train-steps", 1, "--train-batch-size", 2, "--gradient-accum-step", 1, "--valid-steps", 1]
        flags = (*data, *small, *few, "--checkpoints-dir", self.folder / "out", *flags)
        return ["run_pretrain.py", *map(str, flags)]

    def resume(self) -> list[str]:
        return ["run_pretrain.py", "--checkpoints-dir", str(self.folder / "out"), "--resume", str(self.checkpoint),
                "--train-steps", "21"]  # fmt: skip

    def load(self, source: Path) -> list[str]:
        return ["generate.py", "--model", str(source), "--prompt", "x", "--tokenizer", "bytes"]

    def convert(self, source: Path) -> list[str]:
        return ["scripts/convert_checkpoint.py", "--input", str(source), "--output-dir", str(self.folder / "out")]

    def evil(self, way: str = "system") -> object:
        return {
            "system": _Call(os.system, f"touch {self.sentinel}"),
            "exec": _Call(exec, f"open({str(self.sentinel)!r}, 'w')"),
            "popen": _Call(subprocess.Popen, ["touch", str(self.sentinel)]),
            "open": _Call(io.open, str(self.sentinel), "w"),
        }[way]


class _Call:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def sign(checkpoint: Path) -> None:
    """Write COMPLETE again, as a stranger would."""
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.name != "COMPLETE"]
    entries = {
        file.relative_to(checkpoint).as_posix(): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in files
    }
    (checkpoint / "COMPLETE").write_text(signed({"step": 20, "files": entries}))


def signed(contents: object) -> str:
    """Return the text of COMPLETE, with the hash of its contents if they can have one."""
    if isinstance(contents, dict):
        contents = {name: value for name, value in contents.items() if name != "sha256"}
        contents["sha256"] = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    return json.dumps(contents)


def changed(file: Path, change: Callable[[Any], object] | str) -> str:
    """Return a text in place of the JSON in `file`: `change` itself, or what it makes of the values."""
    return change if isinstance(change, str) else json.dumps(change(json.loads(file.read_text())))
