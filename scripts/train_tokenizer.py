#!/usr/bin/env python
"""Text -> a byte-level BPE tokenizer: `python scripts/train_tokenizer.py --input books/ --output-dir my-tokenizer`."""

import sys

from gpt2xla.commands.train_tokenizer import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
