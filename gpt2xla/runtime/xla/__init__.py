"""PyTorch/XLA through PJRT: TPUs, and XLA's CPU devices for tests."""
