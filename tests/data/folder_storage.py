"""An object store in a local folder, behind `folder://`: objects appear whole or not at all, and one is created only once.

Tests are told of each change before and after it, may fail it, and may be a process that is killed there."""

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from data.documents import hashes
from fsspec.implementations.local import LocalFileSystem

_UNFINISHED = "unfinished-"


class FolderStorage(LocalFileSystem):
    protocol = "folder"
    cachable = False
    before: ClassVar[Callable[[str], None]]
    after: ClassVar[Callable[[str], None]]

    @classmethod
    def register(cls) -> None:
        fsspec.register_implementation("folder", cls, clobber=True)
        cls.before = cls.after = staticmethod(lambda path: None)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._make(path, lambda file: file.write_bytes(value), mode)

    def put_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        self._make(path2, lambda file: shutil.copyfile(path1, file), "overwrite")

    def rm_file(self, path: str) -> None:
        FolderStorage.before(path)
        super().rm_file(path)
        FolderStorage.after(path)

    def _make(self, path: str, write: Callable[[Path], Any], mode: str) -> None:
        FolderStorage.before(path)
        target = Path(self._strip_protocol(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.parent.parent / f"{_UNFINISHED}{secrets.token_hex(8)}"
        write(unfinished)
        if mode == "create":
            os.link(unfinished, target)
            unfinished.unlink()
        else:
            os.replace(unfinished, target)
        FolderStorage.after(path)

    def find(self, path: str, *arguments: Any, **kwargs: Any) -> Any:
        found = super().find(path, *arguments, **kwargs)
        keep = {name for name in found if not Path(name).name.startswith(_UNFINISHED)}
        return {name: found[name] for name in keep} if isinstance(found, dict) else sorted(keep)


def objects(folder: Path) -> dict[str, str]:
    """The hashes of the objects in a folder, without those that a killed process was about to make."""
    return {name: digest for name, digest in hashes(folder).items() if _UNFINISHED not in name}
