"""What libtpu's compiler makes of GPT-2's training step: `make tpu-table REFERENCE=/path/to/pre-training-gpt2`.

124M, 32 sequences of 1,024 tokens per device and the devices of one host, bf16, AdamW, clipping, beside the reference
trainer (minhnguyent546/pre-training-gpt2) at the largest power of two that fits it, and beside JAX's trainers MaxText and
Levanter. Writes results/tpu_124m.{json,md}; rows of what is not compiled this time stay. docs/will-it-fit.md says what
the peers need. `--fits` instead finds, to an eighth, the largest batch of the larger sizes that each TPU holds, and writes
results/tpu_fits.{json,md}. It begins with the answers that are there.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tpu_peers

from gpt2xla.config import PRESETS, RunConfig, XlaConfig
from gpt2xla.errors import InputError, RunFailed
from gpt2xla.processes.exits import exit_code
from gpt2xla.tpu_check.check import check, find_batch
from gpt2xla.tpu_check.topologies import TOPOLOGIES
from gpt2xla.tpu_check.traced_step import graph_in

RESULTS = Path(__file__).parent / "results"
STEP = {"gradient_accum_step": 1, "mixed_precision": "bf16", "vocab_size": 50304}
REPLICAS = XlaConfig(use_syncfree_optim=True)
ORDER = ["ours", "ours, blocks checkpointed", "reference", *tpu_peers.STEPS]
REFERENCE_SEQUENCES = {"v3-8": 16, "v5e-8": 16, "v6e-8": 32}
SHARDED = XlaConfig(use_syncfree_optim=True, spmd=True, fsdp=True)
LARGER = {"gpt2-medium": REPLICAS, "gpt2-large": REPLICAS, "gpt2-xl": SHARDED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="a checkout of the reference trainer")
    parser.add_argument("--maxtext", type=Path, help="a checkout of AI-Hypercomputer/maxtext")
    parser.add_argument("--levanter", type=Path, help="a checkout of stanford-crfm/levanter")
    parser.add_argument("--peers-python", type=Path, help="the Python that has the packages of MaxText and Levanter")
    parser.add_argument("--skip-ours", action="store_true", help="compile only the other trainers' steps")
    parser.add_argument("--fits", action="store_true")
    parser.add_argument("--topologies", nargs="+", choices=list(TOPOLOGIES))
    parser.add_argument("--models", nargs="+", default=list(LARGER), choices=list(LARGER))
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if options.fits:
        fits(options.models, options.topologies or ["v3-8", "v5e-8", "v6e-8"])
        return
    if options.reference and not (options.reference / "gpt2" / "model.py").is_file():
        raise InputError(
            f"--reference {options.reference}: no gpt2/model.py there; name a checkout of pre-training-gpt2"
        )
    peers = tpu_peers.peers_of(options.maxtext, options.levanter, options.peers_python)
    failed: list[str] = []
    for topology in options.topologies or TOPOLOGIES:
        if not options.skip_ours:
            add(ours(topology))
        if options.reference and topology in REFERENCE_SEQUENCES:
            add([{"step": "reference", **check_reference(options.reference, topology)}])
        for peer in peers:
            for step in peer.steps:
                print(f"{topology}: {step}: lowering and compiling ...", flush=True)
                try:
                    add([tpu_peers.row(peer, options.peers_python, topology, step)])
                except RunFailed as error:  # the others take an hour, and do not depend on it
                    failed.append(f"{topology}, {step}: {error}")
    if failed:
        raise RunFailed("; ".join(failed))


def ours(topology: str) -> Iterator[dict[str, Any]]:
    for checkpointing, step in (("none", "ours"), ("block", "ours, blocks checkpointed")):
        batch = 32 * TOPOLOGIES[topology].devices
        flat = PRESETS["gpt2"] | STEP | {"train_batch_size": batch, "activation_checkpointing": checkpointing}
        yield {"step": step, **check(RunConfig.from_flat(flat), REPLICAS, topology, print)}


def add(made: Iterable[dict[str, Any]]) -> None:
    """Write the table with each new row in the place of an earlier one of the same TPU and step."""
    file = RESULTS / "tpu_124m.json"
    for row in made:
        row = {"date": today(), **row}
        key = row["topology"], row["step"]
        rows = [r for r in json.loads(file.read_text()) if (r["topology"], r["step"]) != key] if file.exists() else []
        rows = sorted([*rows, row], key=lambda r: (list(TOPOLOGIES).index(r["topology"]), ORDER.index(r["step"])))
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
        "| ours / it: cycles, bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['topology']} | {row['step']} | {row['sequences_per_device']} | {memory(row)} | {costs(row)} "
            f"| {ratios(rows, row)} |"
        )
    return lines


def ratios(rows: list[dict[str, Any]], row: dict[str, Any]) -> str:
    """Return our cycles and bytes over those of `row`; "" if this is our row or either does not fit."""
    for best in rows:
        if (
            best["step"] == "ours" != row["step"]
            and best["topology"] == row["topology"]
            and best["fits"]
            and row["fits"]
        ):
            return ", ".join(f"{per_32(best, key) / per_32(row, key):.2f}" for key in ("cycles", "bytes"))
    return ""


def per_32(row: dict[str, Any], key: str) -> float:
    return row[key] * 32 / row["sequences_per_device"]


def costs(row: dict[str, Any]) -> str:
    if not row["fits"]:
        return "does not compile | | " if "refused" in row else "does not fit | | "
    about = "~" if row.get("counted_by_us") else ""
    kernels = " + kernels" if "counted_by_us" in row else ""  # JAX's do not state theirs
    flops, moved = per_32(row, "flops") / 1e12, per_32(row, "bytes") / 1e9
    return f"{about}{flops:.1f}{kernels} | {about}{moved:.0f} | {per_32(row, 'cycles') / 1e6:.0f}"


def memory(row: dict[str, Any]) -> str:
    return f"{row['peak_gib']:.2f} of {row['memory_gib']:.2f}" if "peak_gib" in row else ""


def fits(models: list[str], topologies: list[str]) -> None:
    file = RESULTS / "tpu_fits.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    for model in models:
        for topology in topologies:
            # The batch is what is sought; this one only has to be a valid one.
            flat = PRESETS[model] | STEP | {"train_batch_size": TOPOLOGIES[topology].devices}
            old = next((row for row in rows if (row["model"], row["topology"]) == (model, topology)), None)
            first = [old["sequences_per_device"], old["too_many"]] if old else []
            report = find_batch(RunConfig.from_flat(flat), LARGER[model], topology, print, tolerance=1 / 8, first=first)
            rows = [row for row in rows if row is not old]
            rows.append({"model": model, "sharded": LARGER[model].fsdp, "date": today(), **report})
            write("tpu_fits", rows, fits_table(rows))


def fits_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | TPU | sequences per device that fit | that do not | alive at the peak, GiB | compiled |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (list(LARGER).index(row["model"]), row["topology"])):
        largest = row["sequences_per_device"] if row["fits"] else "none"
        alive = f"{row.get('alive_gib', row['peak_gib']):.2f} of {row['memory_gib']:.2f}"
        how = ", --spmd --fsdp" if row["sharded"] else ""
        lines.append(
            f"| {row['model']}{how} | {row['topology']} | {largest} | {row['too_many'] or 'not sought'} | {alive} "
            f"| {row['date']} |"
        )
    return lines


def foot(rows: list[dict[str, Any]]) -> list[str]:
    """Return what the table of these rows needs to be read."""
    lines = []
    if any("counted_by_us" in row for row in rows):
        lines.append(
            "MaxText's and Levanter's kernels do not state their FLOPs. ~: the step loops over its layers, which the "
            "compiler counts once; counted by us."
        )
    return lines + [f"{row['topology']}, {row['step']}: {row['refused']}" for row in rows if "refused" in row]


def write(name: str, rows: list[dict[str, Any]], lines: list[str]) -> None:
    dates = sorted({row["date"] for row in rows})
    last = f"{' to '.join(dates[:1] + dates[1:][-1:])}, libtpu 0.0.21's compiler on {os.cpu_count()} CPU cores"
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text("\n\n".join(["\n".join(lines), *foot(rows), last]) + "\n")
    print("\n".join(lines), flush=True)


def today() -> str:
    return str(datetime.datetime.now(tz=datetime.timezone.utc).date())


if __name__ == "__main__":
    sys.exit(exit_code(main))
