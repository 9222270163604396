#!/usr/bin/env python
"""Tokens per second on paper, from the cycles in results/tpu_124m.json: writes the table of docs/tpu.md again.

`make tpu-table` calls it. Alone it compiles nothing: `python benchmarks/tpu_estimates.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpt2xla.config import PRESETS
from gpt2xla.tpu_check.topologies import TOPOLOGIES

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "tpu_124m.json"
PAGE = ROOT / "docs" / "tpu.md"
HEAD = "| TPU | million cycles | at GHz | ms per update | tokens per second | MFU | roofline: at most |"


def main() -> None:
    lines = estimates(json.loads(TABLE.read_text()))
    print("\n".join(lines))
    before, old = PAGE.read_text().split(HEAD)
    PAGE.write_text(before + "\n".join(lines) + "\n\n" + old.partition("\n\n")[2])


def estimates(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table's lines. A row of results/tpu_124m.json gives one if it is our plain step on one of these TPUs."""
    lines = [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    for row in rows:
        if row["step"] != "ours" or not row["fits"]:
            continue
        topology, tokens = TOPOLOGIES[row["topology"]], row["tokens_per_step"]
        seconds = row["cycles"] / topology.clock
        mfu = tokens / seconds * flops_per_token(row["parameters"]) / (topology.flops * topology.devices)
        lines.append(
            f"| {row['topology']} | {row['cycles'] / 1e6:.0f} | {topology.clock / 1e9:.2f} | {seconds * 1e3:.0f} "
            f"| {tokens / seconds:,.0f} | {mfu:.0%} | {tokens / row['roofline_seconds']:,.0f} ({row['roofline_bound']}) |"
        )
    return lines


def flops_per_token(parameters: int) -> int:
    """Return `GPT2.flops_per_token` of GPT-2 (124M), without making the model."""
    sizes = PRESETS["gpt2"]
    length, width = sizes["seq_length"], sizes["d_model"]
    return 6 * (parameters - length * width) + 12 * sizes["num_layers"] * width * length


if __name__ == "__main__":
    main()
