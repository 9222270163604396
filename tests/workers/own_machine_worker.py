"""run_pretrain.py as one of several processes that share no disk: each has a home of its own below $MACHINES."""

import os

os.environ["HOME"] = os.path.join(os.environ["MACHINES"], os.environ["RANK"])
os.makedirs(os.environ["HOME"], exist_ok=True)

from gpt2xla.commands.train import main  # noqa: E402
from gpt2xla.processes.exits import run_and_exit  # noqa: E402

run_and_exit(main)
