"""Files read and written whole."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def read_json(file: Path) -> Any:
    """Return what the JSON file holds. A byte order mark is allowed.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON in UTF-8, or is nested too deeply.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8; save it as such") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_whole(file: Path, content: bytes | str) -> None:
    """Write `file` so that a reader, or a crash, finds the old content or the new one, never a part.

    Several processes may write the same file at once; one of them wins.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with partial.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def file_sha256(file: Path) -> str:
    """Return the file's SHA-256 as hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
