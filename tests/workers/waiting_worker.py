"""Run by test_torch_parallel.py: one process of a run, which waits in a call of C for minutes, or comes to its end.

Arguments: how many seconds it works in Python, and whether it then waits in C (yes or no).
"""

import hashlib
import sys
import time

from gpt2xla.config import TorchConfig, TrainConfig
from gpt2xla.processes.exits import exit_code
from gpt2xla.runtime.leaving import leaving_together
from gpt2xla.runtime.torch import process_group
from gpt2xla.runtime.torch.runtime import TorchRuntime

process_group.SECONDS_OF_GRACE = 1


def main() -> None:
    runtime = TorchRuntime(TorchConfig(), TrainConfig())
    with leaving_together(runtime):
        runtime.barrier("all are here")
        print("here", flush=True)
        time.sleep(float(sys.argv[1]))
        if sys.argv[2] == "yes":
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)


if __name__ == "__main__":
    sys.exit(exit_code(main))
