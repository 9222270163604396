"""run_pretrain.py, with PJRT_DEVICE run_pretrain_xla.py, as one of several processes that share no disk: each has a home
of its own below $MACHINES."""

import os

os.environ["HOME"] = os.path.join(os.environ["MACHINES"], os.environ["RANK"])
os.makedirs(os.environ["HOME"], exist_ok=True)

if "PJRT_DEVICE" in os.environ:
    from gpt2xla.commands.train_xla import main
else:
    from gpt2xla.commands.train import main
from gpt2xla.processes.exits import run_and_exit  # noqa: E402

run_and_exit(main)
