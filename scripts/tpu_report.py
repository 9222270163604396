#!/usr/bin/env python
"""What this machine's TPU makes of gpt2xla, in ten minutes: `python scripts/tpu_report.py`, and paste what it prints.

Trains a small model whose losses are known, and GPT-2 (124M) for its speed. Downloads nothing, leaves no file behind.
"""

import sys

from gpt2xla.commands.tpu_report import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
