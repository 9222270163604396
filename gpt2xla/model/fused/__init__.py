"""Parts of the model for NVIDIA GPUs: products by torch, and what lies between them in a few Triton kernels.

`block.py` is a whole block, in the lines of `gpt2.Block`, which is its plain form; `cross_entropy.py` is the loss. Each
other file is a part of the block, forward and backward. Importing them needs Triton. `agreement.py`, which does not,
checks them all on the device at hand."""
