"""A model on disk: written, verified, read, converted."""
