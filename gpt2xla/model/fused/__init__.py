"""A block of the model for GPUs: products by torch, and what lies between them in a few Triton kernels.

`block.py` is the block, in the lines of `gpt2.Block`, which is its plain form. Each other file is one of its parts, forward
and backward. Importing them needs Triton."""
