"""The C shim `shim.c`, built and loaded before this very program: writing that fails when told to, whoever writes, be it
Python, C++ or Rust."""

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
    """Start this program anew with the shim before the C library. Without a compiler, go on without."""
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
    """At the end of the program."""
    if is_loaded():
        shutil.rmtree(Path(os.environ[_LOADED]).parent, ignore_errors=True)


def is_loaded() -> bool:
    return _LOADED in os.environ


def arm(part: str, call: int, mode: int, error: int, unless: str = "") -> None:
    """In this process, from now on: of the calls that write to paths that hold `part`, number `call` (from 0) fails with
    `error` (-1: none; they are counted)."""
    _library().fault_arm(part.encode(), unless.encode(), call, mode, error)


def seen() -> int:
    """Calls since it was armed."""
    return int(_library().fault_seen())


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ[_LOADED])
