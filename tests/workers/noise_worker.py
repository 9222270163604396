"""Run by test_embedding_noise.py in its own process: the noise of --neftune-alpha on XLA.

Arguments: a file with {"ids", "seeds", "alpha", "width"}, as torch.save writes it, and one to write the noise for each seed
to.
"""

import sys

import torch
import torch_xla

from gpt2xla.model.embedding_noise import embedding_noise

if __name__ == "__main__":
    given = torch.load(sys.argv[1])
    ids, device = given["ids"].to(torch_xla.device()), torch_xla.device()
    noise = [embedding_noise(ids, seed.to(device), given["alpha"], given["width"]).cpu() for seed in given["seeds"]]
    torch.save(torch.stack(noise), sys.argv[2])
