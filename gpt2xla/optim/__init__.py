"""Optimizers, their state by parameter name, and the learning-rate schedule."""
