"""Run by test_prepare.py in its own process: prepare_fineweb.py with small blocks, and after each a pause and a record.
STOP_AFTER_BLOCKS kills it there; after FULL_AFTER_BLOCKS the disk is full."""

import errno
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from gpt2xla.data.documents import corpus
from gpt2xla.data.preparation import output_folder, writer
from gpt2xla.data.preparation import pipeline as prepare

corpus._BLOCK_BYTES = 100_000
output_folder._SECONDS_BETWEEN_RECORDS = 0.0
encoded = prepare._Preparation._encoded
stop, full = (int(os.environ.get(name, 10**9)) for name in ("STOP_AFTER_BLOCKS", "FULL_AFTER_BLOCKS"))


def slowly(self: Any) -> Iterator[Any]:
    print("started", flush=True)
    for number, block in enumerate(encoded(self)):
        if number == 2:
            print("recorded", flush=True)  # the first block; one is held back
        if number == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == full:
            writer.ShardWriter.add = no_space  # type: ignore[method-assign]
        yield block
        time.sleep(0.04)


def no_space(self: Any, *arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


prepare._Preparation._encoded = slowly  # type: ignore[method-assign]
sys.argv = ["scripts/prepare_fineweb.py", *sys.argv[1:]]
runpy.run_path("scripts/prepare_fineweb.py", run_name="__main__")
