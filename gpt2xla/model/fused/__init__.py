"""Parts of the model for NVIDIA GPUs: products by torch, and what lies between them in a few Triton kernels.

Each file is one part, forward and backward. Importing them needs Triton."""
