"""What the tests of recognition share: pictures of a few words, formats of one and of several tokens per word, splits of
masked rows, and a scorer in float64, made of Hugging Face's model and tokenizer, that reads sketches as text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from gpt2xla.data.preparation.rows import Sample, write_rows
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.sketches.format import SketchFormat, picture_text
from gpt2xla.sketches.tokenizer import train_tokenizer

WORDS = ["apple", "car", "cart", "The Eiffel Tower", "fish", "see saw", "tree"]  # of which one begins another


def format_of(kind: str) -> SketchFormat:
    """Pictures of 12 pixels in 24 tokens, with words of one; or of 6 pixels in bytes."""
    if kind == "pieces":
        return SketchFormat.fitted(train_tokenizer(dict.fromkeys(WORDS, 1), 12, 600), 12, WORDS)
    return SketchFormat.fitted(load_tokenizer("bytes"), 6, WORDS)


def pictures(count: int, size: int, seed: int = 0) -> list[tuple[np.ndarray, str]]:
    """A block of ink at a place of its own for each word, and a few pixels anywhere."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        picture = random.random((size, size)) < 0.1
        place = number % len(WORDS)
        picture[place % 4 : place % 4 + 2, place // 4 : place // 4 + 3] = True
        found.append((picture, WORDS[place]))
    return found


def make_data(folder: Path, format: SketchFormat, row_length: int, count: int = 60) -> Path:
    """train/ and test/. Every other sketch begins with its word; of the others only the word after is trained on."""
    for number, split in enumerate(("train", "test")):
        (folder / split).mkdir(parents=True)
        samples = []
        for place, (picture, word) in enumerate(pictures(count, format.size, seed=number)):
            ids = format.ids(word, picture, place % 2 == 0)
            trained = np.ones(len(ids), dtype=np.bool_)
            trained[: len(format.naming_prompt(picture)) if place % 2 else 1] = False
            samples.append(Sample(ids, trained, len(ids)))
        write_rows(folder / split, samples, format.tokenizer, row_length=row_length, shard_size=10**6)
    return folder


def reference(model_folder: Path, asked: list[np.ndarray]) -> np.ndarray:
    """The log-probability of each word after each picture, one forward pass for each."""
    model = GPT2LMHeadModel.from_pretrained(model_folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    is_single = all(len(tokenizer.encode(word)) == 1 for word in WORDS)
    rows = []
    for picture in asked:
        prompt = f"<|endoftext|><MSGSTART> <IMGSTART>\n{picture_text(picture)}\n<IMGEND>"
        row = []
        for word in WORDS:
            whole = tokenizer.encode(f"{prompt} {word}" if is_single else f"{prompt} {word} <MSGEND>")
            count = len(whole) - len(tokenizer.encode(prompt))
            with torch.no_grad():
                log_probabilities = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
            row.append(sum(log_probabilities[-i, whole[-i]].item() for i in range(1, count + 1)))
        rows.append(row)
    return np.array(rows)
