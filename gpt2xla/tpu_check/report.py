"""What scripts/tpu_report.py makes of its runs: numbers from their lines, and one block of text to paste.

A report has versions, host and `parts`. A part has the facts that `runtime/xla/measuring.py` wrote, the lines of
metrics.jsonl, and `failed`, the reason if its run failed. All of them may be incomplete."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from statistics import median
from typing import Any

from gpt2xla.config import PRESETS, RunConfig
from gpt2xla.errors import counted
from gpt2xla.runtime.xla.compiler_messages import HBM_GIB
from gpt2xla.tpu_check.curve import WARMUP, compare, run_in
from gpt2xla.tpu_check.estimate import SEQUENCES, compiled_seconds

Part = dict[str, Any]

_GIB = 2**30
_LEAST_GIB = 15.0  # that 32 sequences of GPT-2 (124M) need, with room to spare
_PRECISIONS = {"none": "fp32"}
_WIDTH = 110
_LABEL = 16


def sequences_per_device(kind: str) -> int | None:
    """Return how many sequences of GPT-2 (124M) a micro-step has on each device; None leaves it to the runtime."""
    return SEQUENCES if HBM_GIB.get(kind, 0) >= _LEAST_GIB else None


def speed_run(folder: Path, steps: int, share: int | None, devices: int, **changes: Any) -> RunConfig:
    """Return a run of GPT-2 (124M) in `folder`, of 32 sequences per device and update. Its data are written there."""
    sequences = SEQUENCES * devices
    batch = {"train_batch_size": share * devices, "gradient_accum_step": SEQUENCES // share} if share else {}
    options = PRESETS["gpt2"] | {"vocab_size": 50304, "eval_batch_size": devices, "warmup_steps": WARMUP} | changes
    return run_in(folder, options | (batch or {"sequences_per_update": sequences}), steps, steps * sequences)


def numbers(part: Part) -> Part:
    """Return how the losses of a run compare with the known curve, and its `verdict`."""
    lines, kernels = part["lines"], part["facts"].get("kernels", "unknown kernels")
    if not lines:
        return {"verdict": "UNKNOWN: no update was made", "is_good": False}
    found = compare(lines, part["facts"]["precision"])
    updates = counted(len(lines), "update")
    verdict = {
        True: f"AGREES with the known curve for {updates}",
        False: f"DIFFERS from the known curve: do not trust this device with {kernels}",
        None: f"UNKNOWN: no correct run in {part['facts']['precision']} has been measured",
    }[found["agrees"]]
    return {"curve": found, "verdict": verdict, "is_good": found["agrees"] is not False and not part["failed"]}


def speed(part: Part) -> Part:
    """Return what a run's updates took, beside what the device and the compiler promise, and its `verdict`."""
    facts, lines = part["facts"], part["lines"]
    first = min(5, len(lines) // 2)  # updates that are left out: the first one compiles
    times = [line["time"] for line in lines]
    seconds = [b - a for a, b in zip(times[first:-1], times[first + 1 :], strict=True)]
    if not seconds or lines[-1]["loss"] is None:
        what = "the loss is no longer a number" if seconds else "too few updates were made"
        return {"verdict": f"UNKNOWN: {what}", "is_good": False}
    tokens = lines[-1]["tokens"] - lines[-2]["tokens"]
    rate = tokens * len(seconds) / sum(seconds)
    found = {
        "tokens_per_step": tokens, "from_step": first + 2, "step_ms": {"median": 1e3 * median(seconds),
        "min": 1e3 * min(seconds), "max": 1e3 * max(seconds)}, "tokens_per_second": rate,
        "mfu": rate * facts["flops_per_token"] / facts["peak_flops"] if facts.get("peak_flops") else None,
        "estimated_ms": 1e3 * estimated if (estimated := compiled_seconds(facts["kind"])) else None,
    }  # fmt: skip
    verdict = f"{rate:,.0f} tokens per second on {counted(facts['devices'], 'device')}"
    return found | {"verdict": verdict, "is_good": not part["failed"]}


def block(report: dict[str, Any]) -> str:
    """Return the report as text between two lines of ```, which GitHub shows as it is."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    host = counted(report["host_cores"], "core") + (f", {report['notebook']}" if report["notebook"] else "")
    facts: dict[str, Any] = next((part["facts"] for part in report["parts"] if part["facts"]), {})
    devices = f"{facts['devices']} x {facts['kind']} ({facts['type']})" if facts else "none answered"
    lines = ["```text", f"gpt2xla tpu_report, {report['date']}"]
    lines += _row("versions", versions) + _row("devices", f"{devices}; host: {host}")
    for name, flags in facts.get("flags", {}).items():
        lines += _row(name, flags.strip() or "not set")
    for part in report["parts"]:
        lines += ["", f"{part['title']}: {'FAILED: ' + part['failed'] if part['failed'] else part['verdict']}"]
        if part["failed"] and part.get("verdict"):
            lines += _row("until then", part["verdict"])
        for name, text in _rows(part, report["why_no_kernels"]):
            lines += _row(name, text)
    return "\n".join([*lines, "```"])


def _rows(part: Part, why_no_kernels: str | None) -> list[tuple[str, str]]:
    facts, lines = part["facts"], part["lines"]
    rows = [("last words", line) for line in part.get("last_words", [])]
    if "kernels" in facts:
        precision = _PRECISIONS.get(facts["precision"], facts["precision"])
        rows.append(("kernels", f"{facts['kernels']}; {precision}"))
        if facts["type"] == "TPU" and "flash" not in facts["kernels"]:
            rows.append(
                ("", f"FLASH ATTENTION WAS NOT USED: {why_no_kernels or 'this run or this TPU does without it'}")
            )
    if compiles := facts.get("compile_seconds"):
        each = ", ".join(f"{seconds:g}" for seconds in compiles)
        rows.append(("compiles", f"{counted(len(compiles), 'program')} in this process, of {each} s"))
    if "curve" in part:
        rows += _curve_rows(part["curve"])
    if "step_ms" in part:
        rows += _speed_rows(part)
    if traced := [line["trace_ms"] for line in lines[1:] if line["trace_ms"] is not None]:
        rows.append(("host", f"{median(traced):.1f} ms of tracing and waiting for data per update (median)"))
    if "step_ms" in part:
        rows.append(("memory", _memory(facts)))
    if lines:
        rows.append(("losses", " ".join(_loss(line["loss"]) for line in lines)))
    if "seconds" in part:
        rows.append(("took", f"{part['seconds']:.0f} s, start and end included"))
    return rows


def _curve_rows(curve: dict[str, Any]) -> list[tuple[str, str]]:
    bounds = curve["bounds"] or {}

    def shown(name: str, digits: str) -> str:
        bound = f" of at most {bounds[name]:{digits}}" if bounds else ""
        return f"{curve[name]:{digits}}{bound}"

    return [
        ("from fp32", f"losses: largest difference {shown('largest', '.2g')} nats, mean {shown('mean', '.2g')}; gradient "
        f"norms: largest {shown('grad_norm', '.2%')}"),
        ("bounds", "twice the largest differences of correct runs on CPUs (gpt2xla/tpu_check/curve.json)"),
    ]  # fmt: skip


def _speed_rows(part: Part) -> list[tuple[str, str]]:
    facts, step, rate = part["facts"], part["step_ms"], part["tokens_per_second"]
    peak, estimated = facts.get("peak_flops"), part["estimated_ms"]
    last = part["lines"][-1]["step"]
    mfu = f"{part['mfu']:.1%} of {peak / 1e12:,.0f} TFLOP/s" if peak else "unknown, as the devices' peak rate is"
    share = (
        f"{estimated:.1f} ms by the compiler's cycles, without waiting for memory and network: the measured step takes "
        f"{step['median'] / estimated:.2f} times as long"
        if estimated
        else "no table of the compiler's cycles for this device here"
    )
    return [
        ("step", f"median {step['median']:.1f} ms, least {step['min']:.1f}, most {step['max']:.1f} (updates "
        f"{part['from_step']} to {last}, {part['tokens_per_step']:,} tokens each)"),
        ("tokens/s", f"{rate:,.0f}; per device {rate / facts['devices']:,.0f}"),
        ("MFU", mfu),
        ("estimate", share),
    ]  # fmt: skip


def _memory(facts: dict[str, Any]) -> str:
    found = facts.get("memory") or {}
    if not found.get("peak_bytes_used"):
        return "unknown: torch_xla does not say"
    limit = f" of {found['bytes_limit'] / _GIB:.2f}" if found.get("bytes_limit") else ""
    return f"at most {found['peak_bytes_used'] / _GIB:.2f}{limit} GiB used on the first device"


def _loss(loss: float | None) -> str:
    return f"{loss:.3f}" if loss is not None and math.isfinite(loss) else "nan"


def _row(name: str, text: str) -> list[str]:
    """Return a name and what belongs to it, in lines."""
    first, later = f"  {name:<{_LABEL}} ", " " * (_LABEL + 3)
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False) or [first]
