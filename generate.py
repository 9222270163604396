#!/usr/bin/env python
"""Continue text with a GPT-2: `python generate.py --model checkpoints --prompt "Once upon a time"`."""

import sys

from gpt2xla.commands.generate import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
