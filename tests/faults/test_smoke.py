"""A few cases of each kind of fault; `make faults` does them all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    "name",
    [
        *(
            "kill",
            "kill-in-save",
            "kill-one",
            "signals",
            "damage",
            "disk",
            "slow",
            "nonfinite",
            "shared-folder",
            "moved",
        ),
        pytest.param("launched", marks=pytest.mark.slow),
    ],
)
def test_faults(name: str, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "tests.faults", "--scale", "smoke", "--only", name, "--results", str(results)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(results.read_text())[name]["rows"]
    assert all(row["passed"] == row["total"] for row in rows)
    assert any(row["total"] for row in rows) or all("not run" in note for row in rows for note in row["notes"])
