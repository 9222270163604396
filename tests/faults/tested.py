"""Counts the faults that are tested with pytest: how many of their cases pass."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.faults.cases import Row, Setting
from tests.faults.runs import ROOT

_FILES = {
    "hostile": ("hostile data, checkpoint and option files", "one line names the file, exit code 2, no half files"),
    "test_fuzz.py": ("command lines and files made at random, 1000 in all", "exit code 0 or 2, one line, no traceback"),
    "test_wandb.py": ("Weights & Biases failing in every call", "the run continues and ends with the same numbers"),
}  # fmt: skip


def tested(setting: Setting) -> list[Row]:
    rows = []
    for name, (fault, bar) in _FILES.items():
        row, file = Row(fault, bar), ROOT / "tests" / "faults" / name
        if file.exists():
            _count(row, file, setting)
        else:
            row.notes.append("not here yet")
        rows.append(row)
    return rows


def _count(row: Row, file: Path, setting: Setting) -> None:
    begun, report = time.monotonic(), setting.folder / f"{file.name}.xml"
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment |= {"PYTHONPATH": str(ROOT), "GPT2XLA_FAULTS": "full" if setting.full else ""}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", f"--junitxml={report}", str(file)], cwd=ROOT,
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    row.seconds = time.monotonic() - begun
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is None:
            row.add(case.find("failure") is None and case.find("error") is None)
    if result.returncode:
        print(result.stdout[-3000:])
