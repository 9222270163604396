"""Tokens per second on paper, and what the known curve can tell."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

from gpt2xla.tpu_check import curve
from gpt2xla.tpu_check.estimate import compiled_seconds

ROWS = json.loads((ROOT / "benchmarks" / "results" / "tpu_124m.json").read_text())
STORED = json.loads((Path(curve.__file__).with_name("curve.json")).read_text())


def test_the_page_shows_the_estimates_of_the_table() -> None:
    """`python benchmarks/tpu_estimates.py` writes them; here they are computed again. Clocks: Jouppi et al. 2023 for v3, and
    the published peak over 4 matrix units, of 128 x 128 on v5e and of 256 x 256 on v6e."""
    clocks = {"v3-8": 0.94e9, "v5e-8": 197e12 / (8 * 128**2), "v6e-8": 918e12 / (8 * 256**2)}
    shown = re.findall(r"^\| (v\w+-\d) \| (\d+) \| .* \| ([\d,]+) \| \d+% \|", (ROOT / "docs/tpu.md").read_text(), re.M)
    assert {topology for topology, *_ in shown} >= clocks.keys()
    ours = {row["topology"]: row for row in ROWS if row["step"] == "ours"}
    for topology, cycles, rate in shown:
        row = ours[topology]
        assert int(cycles) == round(row["cycles"] / 1e6)
        if topology in clocks:
            expected = 8 * 32 * 1024 / (row["cycles"] / clocks[topology])
            assert float(rate.replace(",", "")) == pytest.approx(expected, rel=2e-3)
    assert compiled_seconds("TPU v5 lite") == pytest.approx(ours["v5e-8"]["cycles"] / clocks["v5e-8"])
    assert compiled_seconds("cpu") is None


def lines(losses: list[float | None], norms: list[float | None]) -> curve.Lines:
    return [{"loss": loss, "grad_norm": norm} for loss, norm in zip(losses, norms, strict=True)]


def test_the_curve_agrees_with_itself_and_with_no_other() -> None:
    losses, norms = STORED["losses"], STORED["grad_norms"]
    assert len(losses) == len(norms) == curve.STEPS
    assert losses[-1] < losses[0] - 1, "a loss that falls, or the comparison would say little"
    for precision in ("none", "bf16"):
        assert curve.compare(lines(losses, norms), precision)["agrees"]
        assert curve.compare(lines(losses[:6], norms[:6]), precision)["agrees"]
        assert not curve.compare(lines([*losses[:-1], None], norms), precision)["agrees"], "a loss that is no number"
        assert not curve.compare(lines(losses[1:] + losses[:1], norms), precision)["agrees"]
        assert not curve.compare(lines(losses, [norm / 2 for norm in norms]), precision)["agrees"]
    assert curve.compare(lines(losses, norms), "fp16")["agrees"] is None


def test_the_bounds_tell_every_fault_that_was_measured_from_correct_runs() -> None:
    bounds = curve.compare(lines(STORED["losses"], STORED["grad_norms"]), "bf16")["bounds"]
    for fault, found in STORED["faults"].items():
        assert any(found[name] > bounds[name] for name in bounds), fault
    assert len(STORED["faults"]) >= 6
