"""Tests all faults and records the results, from which docs/reliability.md is made: `python -m tests.faults`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

# Before torch and numpy are imported: forked processes must have no threads yet, and the machine is shared.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="offline")

from tests.faults import shim


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--scale", choices=["smoke", "full"], default="smoke", help="some cases of each kind, or all")
    parser.add_argument("--only", metavar="NAME", action="append", help="one scenario; may be given again")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--folder", type=Path, help="where runs write (default: in memory, if /dev/shm is there)")
    parser.add_argument("--results", type=Path, help="JSON of earlier results to add to, and to write")
    parser.add_argument("--report", type=Path, help="write the table to this file")
    options = parser.parse_args()
    shim.load()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # only after ending the runs

    from tests.faults import report, scenarios

    names = options.only or list(scenarios.ALL)
    if unknown := set(names) - scenarios.ALL.keys():
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(scenarios.ALL)}")
    parent = options.folder or (Path("/dev/shm") if Path("/dev/shm").is_dir() else None)
    base = Path(tempfile.mkdtemp(prefix="faults-", dir=parent))
    results = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    failed = False
    print("undisturbed runs", flush=True)
    undisturbed = scenarios.undisturbed(base)
    for name in names:
        begun = time.monotonic()
        print(name, flush=True)
        rows = scenarios.ALL[name](scenarios.setting(base / name, undisturbed, options.scale == "full", options.seed))
        for row in rows:
            print(f"  {row.fault}: {row.passed}/{row.total}", flush=True)
            failed |= row.passed < row.total
        results[name] = {
            "scale": options.scale, "seconds": time.monotonic() - begun, "date": time.strftime("%Y-%m-%d"),
            "rows": [vars(row) for row in rows],
        }  # fmt: skip
        if options.results:
            options.results.write_text(json.dumps(results, indent=1) + "\n")
    if options.report:
        options.report.parent.mkdir(exist_ok=True)
        options.report.write_text(report.text(results, scenarios.ALL))
    shim.unload()
    if failed:
        print(f"the runs that failed are in {base}")
    else:
        shutil.rmtree(base)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
