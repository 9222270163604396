"""A few cases of each kind of fault; `make faults` does them all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from faults import report

_QUICK = ["kill", "kill-in-save", "signals", "damage", "disk", "nonfinite"]
_OTHERS = ["best", "kill-one", "slow", "shared-folder", "moved", "launched"]
_OTHERS += ["bucket-kill", "bucket-kill-again", "bucket-fail", "bucket-machines", "spot"]


def do(names: list[str], folder: Path) -> tuple[dict[str, Any], str]:
    """Return the results by scenario, and the output."""
    results, scenarios = folder / "results.json", [word for name in names for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--scale", "smoke", "--results", str(results), *scenarios],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert results.exists(), done.stdout + done.stderr
    return json.loads(results.read_text()), done.stdout + done.stderr


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return do(_QUICK, tmp_path_factory.mktemp("faults"))


def check(result: dict[str, Any], printed: str) -> None:
    for row in result["rows"]:
        assert row["passed"] == row["total"], printed
    if not any(row["total"] for row in result["rows"]):
        pytest.skip(result["rows"][0]["notes"][0])


@pytest.mark.parametrize("name", _QUICK)
def test_a_run_survives(name: str, done: tuple[dict[str, Any], str]) -> None:
    check(done[0][name], done[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", _OTHERS)
def test_a_run_survives_this_too(name: str, tmp_path: Path) -> None:
    results, printed = do([name], tmp_path)
    check(results[name], printed)


def test_the_page_prints_each_note_once() -> None:
    notes = {"a": ["x"], "b": ["x"], "c": ["y", "z"]}
    rows = [
        {"fault": fault, "bar": "", "passed": 1, "total": 1, "seconds": 1, "notes": notes[fault]} for fault in notes
    ]
    page = report.text({"scenario": {"rows": rows, "date": "2026-11-21", "scale": "full"}}, ["scenario"])
    assert page.endswith("## Notes\n\n- x, in each of these:\n    - a\n    - b\n- c: y; z\n")
