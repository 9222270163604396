#!/usr/bin/env python
"""Pushes a model to the Hugging Face hub: `python scripts/push_to_hub.py --model checkpoints --name you/my-gpt2`."""

import sys

from gpt2xla.commands.push_to_hub import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
