"""docs/reliability.md, from results."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from typing import Any

_HEAD = """# Reliability

What the trainer survives, measured. This repeats all of it, in two hours on 2 cores, and writes this page:

<!-- test: check flags. Needs two hours -->
```bash
make faults
```

Each row is a fault, done to real processes, and what had to hold after it. "Held" counts how often it did, and of how many
tries. `tests/faults/` does it.

Runs are small (28,032 parameters, 60 steps, a checkpoint every 6, validation every 9), which makes the moments that a fault
can hit many and the runs short. "As if unbroken" means: losses and validation losses as hexadecimal floats, the windows
that each step read, and the bytes of the last weights and of the optimizer's moments are those of a run that nothing
happened to.

Runs in buckets have 24 steps. Their stores are moto's S3 and gcp-storage-emulator's GCS on the same machine, and a machine
is an empty `--scratch-dir`. Not run on a real cloud.

Unless a row says otherwise, processes are forks of the harness that go through `run_pretrain.py`'s `main`, joined by gloo
where there are two.
"""


def text(results: dict[str, Any], scenarios: Iterable[str]) -> str:
    """The page; of `scenarios`, those without a result are named."""
    lines = [_HEAD, "| Fault | What must hold | Held | Seconds |", "|---|---|---|---|"]
    faults_of: dict[str, list[str]] = {}
    for result in results.values():
        for row in result["rows"]:
            if not row["total"] and not row["notes"]:  # nothing of it at this scale
                continue
            held = f"{row['passed']}/{row['total']}" if row["total"] else "not run"
            lines.append(f"| {row['fault']} | {row['bar']} | {held} | {row['seconds']:.0f} |")
            for note in row["notes"]:
                faults_of.setdefault(note, []).append(row["fault"])
    dates = sorted({result["date"] for result in results.values()})
    scales = sorted({result["scale"] for result in results.values()})
    lines += ["", f"{' and '.join(dates)}, {os.cpu_count()} cores of {_processor()}, scale: {' and '.join(scales)}."]
    if missing := [name for name in scenarios if name not in results]:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    if faults_of:
        lines += ["", "## Notes", "", *_notes(faults_of)]
    return "\n".join(lines) + "\n"


def _notes(faults_of: dict[str, list[str]]) -> list[str]:
    """Each note once: those of one fault on a line with it, one of several faults with a list of these."""
    notes_of: dict[tuple[str, ...], list[str]] = {}
    for note, faults in faults_of.items():
        notes_of.setdefault(tuple(dict.fromkeys(faults)), []).append(note)
    lines = []
    for faults, notes in notes_of.items():
        if len(faults) == 1:
            lines.append(f"- {faults[0]}: {'; '.join(notes)}")
        else:
            lines += [f"- {'; '.join(notes)}, in each of these:", *(f"    - {fault}" for fault in faults)]
    return lines


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
