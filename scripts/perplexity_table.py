#!/usr/bin/env python
"""Loss and perplexity of several models on one split: `python scripts/perplexity_table.py --models gpt2 checkpoints
--valid-dir fineweb_10BT/test` writes perplexity.md and perplexity.json.
"""

import sys

from gpt2xla.commands.perplexity_table import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
