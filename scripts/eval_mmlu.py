#!/usr/bin/env python
"""A model's accuracy on MMLU: `python scripts/eval_mmlu.py --model checkpoints --shots 5`."""

import sys

from gpt2xla.commands.eval_mmlu import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
