#!/usr/bin/env python
"""Names drawings: `python scripts/recognise.py apple.png --model checkpoints` shows the likeliest words."""

import sys

from gpt2xla.commands.recognise import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
