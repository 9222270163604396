#!/usr/bin/env python
"""Models side by side, in one table and one picture: `python scripts/compare_models.py base tuned --mmlu --hellaswag
--valid-dir my-data --plot compared.png`.
"""

import sys

from gpt2xla.commands.compare_models import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
