"""JSON from files that anyone may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(file: Path) -> Any:
    """What the file holds. Raises OSError, and ValueError for all that is no JSON, or is nested beyond reading."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
