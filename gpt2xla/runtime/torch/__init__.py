"""Plain PyTorch: CPU, CUDA and MPS, one process or several under torchrun."""
