#!/usr/bin/env python
"""Opens a page in the browser for models of a run: `python scripts/playground.py --model checkpoints`."""

from gpt2xla.commands.playground import main
from gpt2xla.processes.exits import run_and_exit

if __name__ == "__main__":
    run_and_exit(main)
