#!/usr/bin/env python
"""Plots the loss of one or more runs against tokens: `python scripts/plot_loss.py checkpoints --output loss.png`."""

import sys

from gpt2xla.commands.plot_loss import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
