#!/usr/bin/env python
"""Text files -> token shards: `python scripts/prepare_text.py --input books/ --output-dir data/books`."""

import sys

from gpt2xla.commands.prepare_text import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
