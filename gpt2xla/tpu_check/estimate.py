"""From the compiler's cycles to tokens per second: an estimate, as no step has been timed.

The compiler's cycles are those that it expects its program to take, with memory. Our kernels count without more waiting for
memory than their traffic takes at its full rate, and nothing counts the network between chips. So a real step takes longer,
by how much is what scripts/tpu_report.py is for."""

from __future__ import annotations

import json
from pathlib import Path

from gpt2xla.tpu_check.topologies import TOPOLOGIES

SEQUENCES = 32  # of 1,024 tokens, per device and update, in the table
_TABLE = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "results" / "tpu_124m.json"


def compiled_seconds(kind: str) -> float | None:
    """Return the estimate for an update of GPT-2 (124M) with 32 sequences on a device of this kind, from the table that
    `make tpu-table` makes; None if that is not here, or does not have the device."""
    if not _TABLE.exists():
        return None
    for row in json.loads(_TABLE.read_text()):
        is_ours = row["step"] == "ours" and row["fits"] and row["sequences_per_device"] == SEQUENCES
        if is_ours and TOPOLOGIES[row["topology"]].kind == kind:
            return row["cycles"] / TOPOLOGIES[row["topology"]].clock
    return None
