"""What gpu.py found, as a page of Markdown."""

from __future__ import annotations

import statistics
from typing import Any

from train_turns import largest_costs, spread, table

Reports = list[dict[str, Any]]


def page(results: dict[str, Any]) -> str:
    e = results["environment"]
    head = (
        f"{e['card']} ({e['memory_GB']:.0f} GB), driver {e['driver']}; {results['date']}; torch {e['torch']}, CUDA "
        f"{e['cuda']}, cuDNN {e['cudnn']}, Triton {e['triton']}, transformers {e['transformers']}; Python {e['python']}, "
        f"{e['cores']} cores."
    )
    parts = [head, _checks(of_kind(results, "check")), summary(results), _details(of_kind(results, "rates"))]
    for report in of_kind(results, "save"):
        seconds = statistics.median(report["seconds"][1:])
        parts.append(f"A checkpoint of {report['bytes'] / 1e9:.1f} GB stops training for {seconds:.2f} s.")
    parts += [_kernels(of_kind(results, "kernel")), _steps(results["steps"], of_kind(results, "note"))]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def of_kind(results: dict[str, Any], kind: str) -> Reports:
    return [report for report in results["reports"] if report["report"] == kind]


def summary(results: dict[str, Any]) -> str:
    """Return the rates of training and generation."""
    runs, generated = [report["run"] for report in of_kind(results, "rates")], of_kind(results, "generation")
    parts = []
    if runs:
        parts += [
            "## Training",
            "Medians of rounds in which all take turns; in brackets the least and the most.",
            table(runs),
        ]
    if generated:
        parts += ["## Generation", _generation(generated)]
    return "\n\n".join(part.strip() for part in parts)


def _checks(checks: Reports) -> str:
    right = sum(report["passed"] for report in checks)
    lines = [f"- {'passed' if report['passed'] else '**failed**'}: {report['what']}" for report in checks]
    return "\n".join([f"## Right or wrong: {right} of {len(checks)} checks passed", "", *lines]) if checks else ""


def _details(rates: Reports) -> str:
    lines = []
    for run in (report["run"] for report in rates):
        name = f"{run['size']}, {run['batch']} x {run['seq_length']}"
        for who, memory in run["memory_bytes"].items():
            host, first = run["host_seconds_per_update"][who], run["first_update_seconds"][who]
            lines.append(
                f"- {name}, {who}: {memory / 1e9:.1f} GB at most, {host * 1e3:.1f} ms of the host per update, first update "
                f"after {first:.0f} s."
            )
        for who, profile in run["profiles"].items():
            if largest_costs(profile):
                lines.append(
                    f"- {name}, {who}: {profile['seconds'] * 1e3:.1f} ms in {profile['launches']:.0f} kernels per update, "
                    "by the profiler."
                )
        if any("nanoGPT" in who for who in run["curves"]):
            lines.append(
                f"- {name}: nanoGPT's compiled model returns its logits too, as in its train.py, which costs a gradient of "
                "zeros."
            )
    return "\n".join(lines)


def _generation(generated: Reports) -> str:
    lines = ["| | batch | tokens/s | ours is faster by | first call, s |", "|---|---|---|---|---|"]
    own = {r["batch"]: statistics.median(r["tokens_per_second"]) for r in generated if r["program"] == "ours"}
    for r in generated:
        rates = r["tokens_per_second"]
        ratio = f"{own[r['batch']] / statistics.median(rates):.2f}" if r["batch"] in own else ""
        lines.append(
            f"| {r['program']} | {r['batch']} | {spread(rates, ',.0f')} | {ratio} | {r['first_seconds']:.1f} |"
        )
    return "\n".join(lines)


def _kernels(kernels: Reports) -> str:
    lines = ["## Single kernels", "", "| | ms | TFLOP/s | TB/s |", "|---|---|---|---|"]
    for r in kernels:
        if "error" in r:
            lines.append(f"| {r['name']} | {r['error']} | | |")
        else:
            flops, moved = r["tflops"], r["terabytes_per_second"]
            rates = f"{flops:.0f} | " if flops else f" | {moved:.2f}"
            lines.append(f"| {r['name']} | {r['ms']:.3f} | {rates} |")
    return "\n".join(lines) if kernels else ""


def _steps(steps: Reports, notes: Reports) -> str:
    lines = [f"- {s['step']}: {s['status']}, {s['seconds']:.0f} s. {s['error']}".rstrip() for s in steps]
    return "\n".join(["## Steps", "", *lines, *(f"- {note['text']}." for note in notes)])
