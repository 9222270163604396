"""Run by test_micro_batch.py in its own process: three runs on XLA, as on a TPU whose compiler refuses large micro-batches.

Prints a JSON object for each: the programs compiled, those refused, and the folder. Arguments: folder, most sequences that
the compiler takes, and the options of the runs; the last run has the split into micro-steps that the first two chose.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch_xla

from gpt2xla.cli import parse_run
from gpt2xla.config import XlaConfig
from gpt2xla.runtime.xla import memory
from gpt2xla.runtime.xla.compiles import count_compiles
from gpt2xla.runtime.xla.runtime import XlaRuntime
from gpt2xla.training.pretrain import pretrain

AS_ON_A_TPU = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 1.60G of 1.00G hbm."


def worker(index: int, root: str, most: int, words: list[str]) -> None:
    memory.HBM_GIB["cpu"] = 1.0  # the formula then takes all of so small an update at once
    runtimes: list[XlaRuntime] = []
    refused: list[int] = []
    sync = torch_xla.sync

    def compiler(*args: Any, **kwargs: Any) -> None:
        size = runtimes[-1].train.micro_batch_size
        if size > most:
            refused.append(size)
            raise RuntimeError(AS_ON_A_TPU)
        sync(*args, **kwargs)

    torch_xla.sync = compiler
    splits = {"first": ["auto"], "noted": ["auto"], "given": [str(most)]}
    for name, batch in splits.items():
        flags = [*words, "--train-batch-size", *batch, "--checkpoints-dir", f"{root}/{name}"]
        config, options = parse_run(XlaConfig, [*flags, "--compile-cache", f"{root}/cache"])

        def make(train: Any, options: XlaConfig = options) -> XlaRuntime:
            runtimes.append(XlaRuntime(options, train))
            return runtimes[-1]

        compiled = count_compiles()
        refused.clear()
        pretrain(config, make)
        stored = json.loads(Path(root, name, "run_config.json").read_text())
        numbers = [stored["train_batch_size"], stored["gradient_accum_step"], stored["sequences_per_update"]]
        print(json.dumps({"compiles": count_compiles() - compiled, "refused": refused, "numbers": numbers}), flush=True)


if __name__ == "__main__":
    root, most, *words = sys.argv[1:]
    torch_xla.launch(worker, args=(root, int(most), words))
