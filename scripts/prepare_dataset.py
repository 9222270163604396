#!/usr/bin/env python
"""A data set from the hub -> token shards: `python scripts/prepare_dataset.py --dataset roneneldan/TinyStories`."""

import sys

from gpt2xla.commands.prepare_dataset import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
