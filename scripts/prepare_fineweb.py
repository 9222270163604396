#!/usr/bin/env python
"""FineWeb -> token shards: `python scripts/prepare_fineweb.py --output-dir fineweb_10BT`."""

import sys

from gpt2xla.commands.prepare_fineweb import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
