#!/usr/bin/env python
"""A model's accuracy on HellaSwag: `python scripts/eval_hellaswag.py --model checkpoints`."""

import sys

from gpt2xla.commands.eval_hellaswag import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
