"""Small models for the page, made in moments."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from generation import chat_model
from induction import induction_model

from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.checkpoint.seal import seal
from gpt2xla.config import ModelConfig
from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.sketches.format import SketchFormat
from gpt2xla.sketches.tokenizer import train_tokenizer

SEQ_LENGTH = 256
WORDS = ("apple", "house", "cat", "tree")
STEPS = (10, 20)  # of the run's checkpoints


def untrained(
    folder: Path,
    tokenizer: Tokenizer,
    settings: GenerationSettings | None = None,
    seed: int = 0,
    scale: float = 1,
    layers: int = 2,
) -> Path:
    """Write a model with random weights, wide 32, and its tokenizer to `folder`. With a larger `scale` of the
    weights, what it says depends more on what it has read."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, seq_length=SEQ_LENGTH, d_model=32, num_layers=layers, num_heads=2
    )
    model = GPT2(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for weights in model.h.parameters():
            weights.mul_(scale)
    folder.mkdir(parents=True, exist_ok=True)
    hf.save_model(folder, config, model.state_dict(), settings or GenerationSettings.of(tokenizer))
    hf.save_tokenizer(folder, tokenizer, SEQ_LENGTH)
    return folder


def run(root: Path) -> Path:
    """Write the folder of a run: two checkpoints, whose texts never end by themselves, and its metrics."""
    endless = GenerationSettings.ending_with(-1)
    for step in STEPS:
        seal(untrained(root / f"step-{step:08d}", load_tokenizer("bytes"), endless, seed=step), step)
    (root / "latest").symlink_to(f"step-{STEPS[-1]:08d}")
    lines = [{"step": step, "tokens": step * 512, "loss": 5 - step / 10, "lr": 1e-3} for step in range(1, 21)]
    lines += [{"step": step, "tokens": step * 512, "valid_loss": 5.1 - step / 10} for step in STEPS]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def sketcher(folder: Path) -> Path:
    """Write a model with a tokenizer for sketches, which draws at random."""
    return untrained(folder, train_tokenizer(Counter(WORDS), 24, 1024), scale=10)


def slow_sketcher(folder: Path) -> Path:
    """Write one whose pictures have a token for each pixel, and many layers: it draws for seconds."""
    return untrained(folder, SketchFormat.fitted(load_tokenizer("bytes"), 24, WORDS).tokenizer, layers=24)


def copier(folder: Path) -> Path:
    """Write a model that knows nothing but how to repeat what is in its text."""
    tokenizer = load_tokenizer("bytes")
    model = induction_model(tokenizer.vocab_size, 64)
    folder.mkdir()
    hf.save_model(folder, model.config, model.state_dict(), GenerationSettings.of(tokenizer))
    hf.save_tokenizer(folder, tokenizer, model.config.seq_length)
    return folder


def all_models(folder: Path) -> list[Path]:
    """Write one of each kind: a run, a model that chats, two that draw, and one that repeats."""
    return [
        run(folder / "run"),
        chat_model.train(folder / "chat"),
        sketcher(folder / "sketcher"),
        slow_sketcher(folder / "slow"),
        copier(folder / "copier"),
    ]
