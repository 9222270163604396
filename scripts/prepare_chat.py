#!/usr/bin/env python
"""Conversations -> rows of tokens to train on the answers: `python scripts/prepare_chat.py --input chats.jsonl`."""

import sys

from gpt2xla.commands.prepare_chat import main
from gpt2xla.processes.exits import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
