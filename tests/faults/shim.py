"""Builds the C shim `shim.c` and loads it before this program. It lets writes fail, in Python, C++ and Rust alike."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ONCE, FOR_GOOD, KILL = 0, 1, 2
_LOADED = "FAULTS_SHIM"


def load() -> None:
    """Restart this program with the shim before the C library. Without a compiler, continue without the shim."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if _LOADED in os.environ or compiler is None:
        return
    library = Path(tempfile.mkdtemp(prefix="faults-shim-")) / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    os.environ |= {"LD_PRELOAD": str(library), _LOADED: str(library)}
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "tests.faults", *sys.argv[1:]])


def unload() -> None:
    """Delete the shim, at the end of the program."""
    if is_loaded():
        shutil.rmtree(Path(os.environ[_LOADED]).parent, ignore_errors=True)


def is_loaded() -> bool:
    return _LOADED in os.environ


def arm(part: str, call: int, mode: int, error: int, unless: str = "") -> None:
    """Let call number `call` (from 0) of this process that writes to a path with `part` in it fail with `error`. With -1 no
    call fails; they are only counted."""
    _library().fault_arm(part.encode(), unless.encode(), call, mode, error)


def seen() -> int:
    """Return the number of calls since the shim was armed."""
    return int(_library().fault_seen())


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ[_LOADED])
