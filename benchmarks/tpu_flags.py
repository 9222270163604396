"""Which flags make libtpu's compiler write a faster training step: `python benchmarks/tpu_flags.py`.

GPT-2 (124M), 32 sequences of 1,024 tokens per device, bf16, AdamW, clipping, is compiled without flags, with ours (those
of gpt2xla/runtime/xla/compiler_flags.py), and with each set of --flags in place of our flags or beside them. Fewer --layers
take less time. Compile times compare only on a machine that does nothing else. Writes results/tpu_flags.{json,md}.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from tpu_table import REPLICAS, STEP, memory, write

from gpt2xla.config import PRESETS, RunConfig
from gpt2xla.runtime.xla.compiler_flags import VARIABLE
from gpt2xla.tpu_check.check import check
from gpt2xla.tpu_check.topologies import TOPOLOGIES

NAME = "tpu_flags"
RESULTS = Path(__file__).parent / "results" / f"{NAME}.json"
FLAGS = [f"--xla_tpu_scoped_vmem_limit_kib={mib * 1024}" for mib in (24, 32, 48, 64, 96)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES), choices=list(TOPOLOGIES))
    parser.add_argument(
        "--flags", nargs="*", default=FLAGS, help="one quoted set of flags each, such as '--xla_x=1 --xla_y=2'"
    )
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for topology in options.topologies:
        flat = PRESETS["gpt2"] | STEP | {"train_batch_size": 32 * TOPOLOGIES[topology].devices}
        config = RunConfig.from_flat(flat | {"num_layers": options.layers})
        for flags in ("", None, *options.flags):
            os.environ.pop(VARIABLE, None)
            if flags is not None:
                os.environ[VARIABLE] = flags
            report = check(config, REPLICAS, topology, print)
            row = {"layers": options.layers, **report}
            rows = [other for other in rows if key(other) != key(row)] + [row]
            write(NAME, rows, table(rows))


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["topology"], row["layers"], row["compiler_flags"]


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| TPU | layers | flags | Mcycles | of none | GB | peak HBM, GiB | s to compile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        none = next(other for other in rows if key(other) == (*key(row)[:2], ""))
        shown = "does not fit | | "
        if row["fits"]:
            share = row["cycles"] / none["cycles"] if none["fits"] else float("nan")
            shown = f"{row['cycles'] / 1e6:.1f} | {share:.3f} | {row['bytes'] / 1e9:.1f}"
        flags = row["compiler_flags"].replace("--xla_", "") or "none"
        lines.append(
            f"| {row['topology']} | {row['layers']} | {flags} | {shown} | {memory(row)} | {row['compile_seconds']:.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
