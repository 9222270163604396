"""`run_pretrain.py` whose processes of the ranks in LIMITED may map half a GiB more once the loop begins."""

import os
import resource
import runpy
from pathlib import Path
from typing import Any

import gpt2xla.runtime.torch.runtime  # noqa: F401  what it maps must not count
from gpt2xla.training import trainer

whole = trainer.Trainer._loop


def limited(self: Any, *args: Any) -> int:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**29,) * 2)
    return whole(self, *args)


if os.environ["RANK"] in os.environ["LIMITED"].split(","):
    trainer.Trainer._loop = limited  # type: ignore[method-assign]
runpy.run_path("run_pretrain.py", run_name="__main__")
