"""Does a run fit a TPU? `python scripts/tpu_compile_check.py --topology v5e-8 v3-8 OPTIONS OF run_pretrain_xla.py`.

Asks the TPU's own compiler, which needs no TPU but the extra tpu-check. Exits with 3 if the run does not fit one of them.
"""

import importlib.util
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2xla.cli import parse_run
from gpt2xla.config import RunConfig, XlaConfig, option
from gpt2xla.config.paths import check_mixture
from gpt2xla.errors import InputError, counted, user_error
from gpt2xla.tpu_check.check import check, check_chosen, find_batch, with_largest_updates
from gpt2xla.tpu_check.topologies import TOPOLOGIES
from gpt2xla.tpu_check.where import described

DOES_NOT_FIT = 3


@dataclass(frozen=True)
class CheckConfig(XlaConfig):
    """TPU check and XLA runner"""

    topology: tuple[str, ...] = option(("v5e-8",), f"TPUs to compile for: {', '.join(TOPOLOGIES)}")
    find_batch: bool = option(False, "find the largest --train-batch-size that fits, which may take many compiles")
    where: bool = option(False, "print where the step's cycles go: its parts, and its largest instructions")
    json: str | None = option(None, "file for the reports, as a list", is_path=True)


def main() -> None:
    # As with Ctrl-C, the process that traces or compiles ends, and its folder is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    config, options = parse_run(CheckConfig, description="Compile a run's training step for TPUs, without a TPU.")
    config.model.check()
    if unknown := [name for name in options.topology if name not in TOPOLOGIES]:
        raise InputError(f"--topology {unknown[0]}: unknown; choose among {', '.join(TOPOLOGIES)}")
    for module in ("torch_xla", "jax", "libtpu"):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"{module} is missing; pip install -e '.[xla,tpu-check]'")
    if options.json:
        with user_error(f"--json {options.json}"):
            Path(options.json).touch()
    config = with_datas_vocabulary(config)
    reports = []
    for topology in options.topology:
        run = with_largest_updates(config, topology)
        is_auto = run.train.train_batch_size == "auto"
        ask = find_batch if options.find_batch else check_chosen if is_auto else check
        report = ask(run, options, topology, say)
        reports.append(report)
        print(describe(report), flush=True)
        if options.where and report["fits"]:
            print(described(report["where"]), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(reports, indent=2) + "\n")
    if not all(report["fits"] for report in reports):
        sys.exit(DOES_NOT_FIT)


def with_datas_vocabulary(config: RunConfig) -> RunConfig:
    """Return the run with the --vocab-size that training takes from its data, where these are on this machine."""
    try:
        check_mixture("--train-dir", config.data.train_dir)
    except InputError:
        if "train_dir" in config.given:
            raise
        return config
    from gpt2xla.data.opening import with_vocabulary
    from gpt2xla.data.split_folders import with_splits

    config, note = with_vocabulary(with_splits(config))
    if note:
        say(note)
    return config


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def describe(report: dict[str, Any]) -> str:
    """Return a report as lines to read."""
    share, used, memory = report["sequences_per_device"], report["peak_gib"], report["memory_gib"]
    verdict = "fits" if report["fits"] else "does NOT fit"
    lines = [
        f"{report['topology']}: {counted(share, 'sequence')} per device and micro-step: {verdict}, "
        f"{used:.2f} of {memory:.2f} GiB"
    ]
    if report["fits"]:
        lines += [
            f"  per device and update: {_shown(report['flops'] / 1e12)} TFLOP, {_shown(report['bytes'] / 1e9)} GB moved, "
            f"{_shown(report['cycles'] / 1e6)} million cycles by the compiler's estimate",
            f"  at {TOPOLOGIES[report['topology']].clock / 1e9:.2f} GHz that is "
            f"{_shown(report['estimated_seconds'] * 1e3)} ms: about "
            f"{report['tokens_per_step'] / report['estimated_seconds']:,.0f} tokens per second on all devices together, an "
            "estimate",
            f"  cannot take less than {_shown(report['roofline_seconds'] * 1e3)} ms ({report['roofline_bound']}-bound): at "
            f"most {report['tokens_per_step'] / report['roofline_seconds']:,.0f} tokens per second on all devices together",
            f"  host: {report['trace_ms']} ms of tracing per update; compiled in {report['compile_seconds']} s here",
        ]
    if report["compiler_flags"]:
        lines.append(f"  compiler flags: {report['compiler_flags']}")
    lines.append("  largest in memory, beside weights and optimizer state:")
    lines += [
        f"    {entry['gib']:.2f} GiB: {entry['count']} x {entry['shape']} {entry['origin']}"
        for entry in report["largest"][:5]
    ]
    return "\n".join(lines)
