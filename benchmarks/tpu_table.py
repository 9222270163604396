"""What libtpu's compiler makes of GPT-2's training step: `make tpu-table REFERENCE=/path/to/pre-training-gpt2`.

124M, 32 sequences of 1,024 tokens per device and 8 devices, bf16, AdamW, clipping, beside the reference trainer
(minhnguyent546/pre-training-gpt2) at the largest power of two that fits it. Writes results/tpu_124m.{json,md}.
`--fits` instead finds, to an eighth, the largest batch of the larger sizes that each TPU holds, and writes
results/tpu_fits.{json,md}.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpt2xla.config import PRESETS, RunConfig, XlaConfig
from gpt2xla.tpu_check.check import check, find_batch
from gpt2xla.tpu_check.topologies import TOPOLOGIES
from gpt2xla.tpu_check.traced_step import graph_in

RESULTS = Path(__file__).parent / "results"
STEP = {"gradient_accum_step": 1, "mixed_precision": "bf16", "vocab_size": 50304}
REPLICAS = XlaConfig(use_syncfree_optim=True)
REFERENCE_SEQUENCES = {"v3-8": 16, "v5e-8": 16, "v6e-8": 32}
SHARDED = XlaConfig(use_syncfree_optim=True, spmd=True, fsdp=True)
LARGER = {"gpt2-medium": REPLICAS, "gpt2-large": REPLICAS, "gpt2-xl": SHARDED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="a checkout of the reference trainer; without it, only ours")
    parser.add_argument("--fits", action="store_true")
    parser.add_argument("--topologies", nargs="+", default=["v3-8", "v5e-8", "v6e-8"], choices=list(TOPOLOGIES))
    parser.add_argument("--models", nargs="+", default=list(LARGER), choices=list(LARGER))
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if options.fits:
        fits(options.models, options.topologies)
    else:
        compare(options.reference, options.topologies)


def compare(reference: Path | None, topologies: list[str]) -> None:
    file = RESULTS / "tpu_124m.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    for topology in topologies:
        rows = [row for row in rows if row["topology"] != topology]
        for checkpointing in ("none", "block"):
            batch = 32 * TOPOLOGIES[topology].devices
            flat = PRESETS["gpt2"] | STEP | {"train_batch_size": batch, "activation_checkpointing": checkpointing}
            row = check(RunConfig.from_flat(flat), REPLICAS, topology, print)
            rows.append({"step": "ours" if checkpointing == "none" else "ours, blocks checkpointed", **row})
        if reference:
            rows.append({"step": "reference", **check_reference(reference, topology)})
        write("tpu_124m", rows, table(rows))


def check_reference(reference: Path, topology: str) -> dict[str, Any]:
    sequences = REFERENCE_SEQUENCES[topology]
    with tempfile.TemporaryDirectory() as folder:
        peer = [str(Path(__file__).with_name("trace_peer.py")), str(reference), str(sequences), folder]
        subprocess.run([sys.executable, *peer], check=True, stderr=subprocess.DEVNULL)
        request = {"topology": topology, "graph": str(graph_in(Path(folder))), "replicas": 8, "spmd": False}
        Path(folder, "request.json").write_text(json.dumps(request | {"output": f"{folder}/answer.json"}))
        print(f"{topology}: compiling the reference at {sequences} per device ...", flush=True)
        compiler = [sys.executable, "-m", "gpt2xla.tpu_check.compile", f"{folder}/request.json"]
        subprocess.run(compiler, check=True, stderr=subprocess.DEVNULL)
        answer = json.loads(Path(folder, "answer.json").read_text())
        trace = json.loads(Path(folder, "trace.json").read_text())
    return {"topology": topology, "sequences_per_device": sequences, **answer, **trace}


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| TPU | step | sequences per device | peak HBM, GiB | TFLOP per 32 | GB moved per 32 | Mcycles per 32 "
        "| of the reference: cycles, bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        per_32 = 32 / row["sequences_per_device"]
        peers = [r for r in rows if r["step"] == "reference" and r["topology"] == row["topology"]]
        ratio = ""
        if peers and row["fits"] and peers[0]["fits"] and row is not peers[0]:
            scale = peers[0]["sequences_per_device"] / row["sequences_per_device"]
            ratio = f"{row['cycles'] / peers[0]['cycles'] * scale:.2f}, {row['bytes'] / peers[0]['bytes'] * scale:.2f}"
        costs = (
            f"{row['flops'] / 1e12 * per_32:.1f} | {row['bytes'] / 1e9 * per_32:.0f} | {row['cycles'] / 1e6 * per_32:.0f}"
            if row["fits"]
            else "does not fit | | "
        )
        lines.append(
            f"| {row['topology']} | {row['step']} | {row['sequences_per_device']} | {memory(row)} | {costs} | {ratio} |"
        )
    return lines


def memory(row: dict[str, Any]) -> str:
    return f"{row['peak_gib']:.2f} of {row['memory_gib']:.2f}"


def fits(models: list[str], topologies: list[str]) -> None:
    file = RESULTS / "tpu_fits.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    for model in models:
        for topology in topologies:
            # The batch is what is sought; this one only has to be a valid one.
            flat = PRESETS[model] | STEP | {"train_batch_size": TOPOLOGIES[topology].devices}
            report = find_batch(RunConfig.from_flat(flat), LARGER[model], topology, print, tolerance=1 / 8)
            rows = [row for row in rows if (row["model"], row["topology"]) != (model, topology)]
            rows.append({"model": model, "sharded": LARGER[model].fsdp, **report})
            write("tpu_fits", rows, fits_table(rows))


def fits_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | TPU | sequences per device that fit | that do not | alive at the peak, GiB |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (list(LARGER).index(row["model"]), row["topology"])):
        largest = row["sequences_per_device"] if row["fits"] else "none"
        alive = f"{row.get('alive_gib', row['peak_gib']):.2f} of {row['memory_gib']:.2f}"
        how = ", --spmd --fsdp" if row["sharded"] else ""
        lines.append(
            f"| {row['model']}{how} | {row['topology']} | {largest} | {row['too_many'] or 'not sought'} | {alive} |"
        )
    return lines


def write(name: str, rows: list[dict[str, Any]], lines: list[str]) -> None:
    today = datetime.datetime.now(tz=datetime.timezone.utc).date()
    foot = f"{today}, libtpu 0.0.21's compiler on {os.cpu_count()} CPU cores"
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text("\n".join([*lines, "", foot]) + "\n")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
