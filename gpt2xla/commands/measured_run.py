"""run_pretrain_xla.py, but it also writes down what the devices are and what the run costs: a part of scripts/tpu_report.py.

`python -m gpt2xla.commands.measured_run FACTS.json OPTIONS OF run_pretrain_xla.py`
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2xla.commands import train_xla
from gpt2xla.config import RunConfig, XlaConfig
from gpt2xla.processes.exits import run_and_exit

if TYPE_CHECKING:
    from gpt2xla.processes.signals import StopSignals


def main() -> None:
    train_xla.main(sys.argv[2:], partial(worker, file=Path(sys.argv[1])))


def worker(
    index: int, config: RunConfig, options: XlaConfig, signals: StopSignals, is_replica: bool = False, *, file: Path
) -> None:
    """Train in this process, as `train_xla.worker` does, with a runtime that writes `file`."""
    from gpt2xla.runtime.xla.measuring import Measuring
    from gpt2xla.training.pretrain import pretrain

    runtime: Any = type("MeasuringRuntime", (Measuring, train_xla.runtime_class(options, is_replica)), {"file": file})
    pretrain(config, lambda train: runtime(options, train), signals)


if __name__ == "__main__":
    run_and_exit(main)
