"""Run by test_torch_parallel.py under torchrun: prints how many threads a process takes where it may run on six cores."""

import os

import torch

from gpt2xla.runtime.torch.cpu import share_cores

if __name__ == "__main__":
    os.sched_getaffinity = lambda pid: set(range(6))  # type: ignore[assignment]
    share_cores()
    if os.environ["RANK"] == "0":
        print(torch.get_num_threads())
