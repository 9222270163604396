#!/usr/bin/env python
"""Does a run fit a TPU? `python scripts/tpu_compile_check.py --topology v5e-8 v3-8 OPTIONS OF run_pretrain_xla.py`.

Asks the TPU's own compiler, which needs no TPU but the extra tpu-check. Exits with 3 if the run does not fit one of them.
"""

import sys

from gpt2xla.commands.tpu_compile_check import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
