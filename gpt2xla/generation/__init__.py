"""Text from a trained model: `generate` works on token ids, `continue_texts` on text."""

from gpt2xla.generation.continuation import continue_texts
from gpt2xla.generation.decoding import generate

__all__ = ["continue_texts", "generate"]
