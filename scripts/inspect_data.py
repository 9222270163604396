#!/usr/bin/env python
"""Shows what a folder of token shards holds, and checks it: `python scripts/inspect_data.py data/books`."""

import sys

from gpt2xla.commands.inspect_data import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
