#!/usr/bin/env python
"""Opens a page in the browser for models of a run: `python scripts/playground.py --model checkpoints`."""

import sys

from gpt2xla.commands.playground import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
