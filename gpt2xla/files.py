"""Files that are read or written whole, and their names."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

from gpt2xla.errors import InputError


def read_json(file: Path) -> Any:
    """Return what the JSON file holds. A byte order mark is allowed.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON in UTF-8, or is nested too deeply."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8; save it as such") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json_object(file: Path) -> dict[str, Any] | None:
    """Return the options in a model's or tokenizer's JSON file; None if there is no such file. Raises InputError if it
    cannot be read, or does not hold a JSON object."""
    try:
        values = read_json(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); copy it again, or remove it") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} holds no options; copy it again, or remove it")
    return values


def write_whole(file: Path, content: bytes | str) -> None:
    """Write `file` so that a reader, or a crash, finds the old content or the new one, never a part.

    Several threads or processes may write the same file at once; one of them wins."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def file_sha256(file: Path) -> str:
    """Return the file's SHA-256 as hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def folder_name(url: str, version: bytes = b"") -> str:
    """Return a name for a folder on this machine that belongs to a URL: readable, and another one for each `version`."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", url)[-80:].strip("-.")
    return f"{readable}-{hashlib.sha256(url.encode() + version).hexdigest()[:16]}"
