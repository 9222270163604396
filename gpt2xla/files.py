"""JSON from files that anyone may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(file: Path) -> Any:
    """What the file holds, with or without a byte order mark. Raises OSError, and ValueError for all that is no JSON in
    UTF-8, or is nested beyond reading."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8; save it as such") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
