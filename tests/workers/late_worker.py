"""Run by test_torch_parallel.py: two processes, one of which is late for a collective while the other drops its model.

Its tensor is then in the hands of a thread of the group alone. A run's thread has that of its last collective, for less
than a millisecond, and longer on a busy machine."""

import faulthandler
import os
import time

import torch
import torch._dynamo  # if DDP imports it later, default arguments of torch's keep the group, by luck
import torch.distributed as dist

from gpt2xla.config import ModelConfig, TorchConfig, TrainConfig
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.torch.runtime import TorchRuntime

rank_1 = os.fork()
os.environ["RANK"] = "0" if rank_1 else "1"
runtime = TorchRuntime(TorchConfig(), TrainConfig(), "cpu")
model = runtime.setup_model(GPT2(ModelConfig(vocab_size=31, seq_length=8, d_model=16, num_layers=1, num_heads=2)))
group = dist.group.WORLD
assert group
runtime.close()
faulthandler.dump_traceback_later(20, exit=True)  # in a thread of C, which needs no lock of Python's
if rank_1:
    group.allreduce([torch.ones(1)])
    del group, model
    print("the model is gone", flush=True)
    os.waitpid(rank_1, 0)
else:
    time.sleep(0.5)
    group.allreduce([torch.ones(1)]).wait()
os._exit(0)
