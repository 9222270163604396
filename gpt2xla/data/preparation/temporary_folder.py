"""A folder for files that only pass through. The next process that makes one removes what a killed process left."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpt2xla.errors import InputError
from gpt2xla.processes.locks import locked

_PREFIX = "gpt2xla-hub-"


@contextlib.contextmanager
def temporary_folder(parent: str | None) -> Iterator[Path]:
    """Make a folder in `parent` (default: that of temporary files), which is removed at the end. Raises OSError."""
    all_folders = Path(parent or tempfile.gettempdir())
    for left_over in all_folders.glob(f"{_PREFIX}*/"):
        # Another process uses it, or it is another user's.
        with contextlib.suppress(InputError, OSError), locked(left_over / "lock", str(left_over)):
            shutil.rmtree(left_over)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=all_folders))
    with locked(folder / "lock", str(folder)):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
