"""docs/reliability.md, from results."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from typing import Any

_HEAD = """# Reliability

What the trainer survives, measured: each row is a fault, done as many times as the last column but one says to real
processes, and what had to hold after it. `make faults` repeats all of it and writes this page; `tests/faults/` is how.

Runs are small (28,032 parameters, 60 steps, a checkpoint every 6, validation every 9), which makes the moments that a fault
can hit many and the runs short. "Exact" means: losses and validation losses as hexadecimal floats, the windows that each
step read, and the bytes of the last weights and of the optimizer's moments are those of a run that nothing happened to.
Unless a row says otherwise, processes are forks of the harness that go through `run_pretrain.py`'s `main`, joined by gloo
where there are two.
"""


def text(results: dict[str, Any], scenarios: Iterable[str]) -> str:
    """The page; of `scenarios`, those without a result are named."""
    lines = [_HEAD, "| Fault | What must hold | Held | Seconds |", "|---|---|---|---|"]
    notes = []
    for result in results.values():
        for row in result["rows"]:
            if not row["total"] and not row["notes"]:  # nothing of it at this scale
                continue
            held = f"{row['passed']}/{row['total']}" if row["total"] else "not run"
            lines.append(f"| {row['fault']} | {row['bar']} | {held} | {row['seconds']:.0f} |")
            notes += [f"- {row['fault']}: {note}" for note in row["notes"]]
    dates = sorted({result["date"] for result in results.values()})
    scales = sorted({result["scale"] for result in results.values()})
    lines += ["", f"{' and '.join(dates)}, {os.cpu_count()} cores of {_processor()}, scale: {' and '.join(scales)}."]
    if missing := [name for name in scenarios if name not in results]:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    if notes:
        lines += ["", "## Notes", "", *notes]
    return "\n".join(lines) + "\n"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
