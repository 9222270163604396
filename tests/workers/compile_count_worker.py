"""Run by test_compile_count.py in its own process: a training run on XLA that counts what reaches the host.

Prints one JSON object. Arguments: those of run_pretrain_xla.py.
"""

import json
import sys
import threading
from typing import Any

import torch_xla
import torch_xla.debug.metrics as met

from gpt2xla.cli import parse_run
from gpt2xla.config import RunConfig, XlaConfig
from gpt2xla.runtime.xla.runtime import XlaRuntime
from gpt2xla.training.pretrain import pretrain
from gpt2xla.training.run_log import RunLog
from gpt2xla.training.trainer import Trainer


def counters() -> dict[str, int]:
    compiled, executed, read = (met.metric_data(name) for name in ("CompileTime", "ExecuteTime", "InboundData"))
    return {
        "compiles": compiled[0] if compiled else 0,
        "executions": executed[0] if executed else 0,
        "reads": read[0] if read else 0,
        "fallbacks": sum(met.counter_value(name) for name in met.counter_names() if name.startswith("aten::")),
    }


def worker(index: int, config: RunConfig, options: XlaConfig) -> None:
    steps: list[dict[str, int]] = []
    readers: set[str] = set()
    original = Trainer._update

    def counted(self: Trainer, *args: Any) -> None:
        original(self, *args)
        steps.append(counters())

    write = RunLog._write

    def written(self: RunLog, step: int, values: dict) -> None:
        if "loss" in values:
            readers.add("loop" if threading.current_thread() is loop else "reader")
        write(self, step, values)

    loop = threading.current_thread()
    Trainer._update, RunLog._write = counted, written
    pretrain(config, lambda train: XlaRuntime(options, train))
    print(json.dumps({"steps": steps, "end": counters(), "readers": sorted(readers)}))


if __name__ == "__main__":
    torch_xla.launch(worker, args=parse_run(XlaConfig, sys.argv[1:]))
