#!/usr/bin/env python
"""Drawings -> rows of tokens to draw and recognise by: `python scripts/prepare_sketches.py --input full/raw/*.ndjson`."""

import sys

from gpt2xla.commands.prepare_sketches import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
