#!/usr/bin/env python
"""Converts a GPT-2 to a Hugging Face folder: `python scripts/convert_checkpoint.py --model ckpt.pt --output-dir my-gpt2`."""

import sys

from gpt2xla.commands.convert_checkpoint import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
