"""A small untrained model whose ids write sketches, for tests: what it draws is noise, in pictures."""

from __future__ import annotations

import torch

from gpt2xla.config import ModelConfig
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.sketches.format import SketchFormat
from gpt2xla.sketches.tokenizer import train_tokenizer

WORDS = ["apple", "cat", "The Great Wall of China"]


def sketch_format(size: int = 8) -> SketchFormat:
    tokenizer = train_tokenizer(dict.fromkeys(WORDS, 1), size, 540)
    return SketchFormat(tokenizer, size, WORDS)


def untrained(format: SketchFormat, seq_length: int) -> GPT2:
    torch.manual_seed(3)
    model = GPT2(ModelConfig(format.tokenizer.vocab_size + 3, seq_length, d_model=32, num_layers=1, num_heads=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model
