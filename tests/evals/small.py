"""What the tests of evaluation share: a split of documents in bytes, models over it, HellaSwag-like items; and independent
scorers in float64, made of Hugging Face's model and tokenizer.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from conftest import prepare_documents
from transformers import AutoTokenizer, GPT2LMHeadModel

from gpt2xla.checkpoint.formats.hugging_face import save_model
from gpt2xla.config import ModelConfig
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2

MODEL_FLAGS = [
    "--vocab-size", "257", "--seq-length", "192", "--d-model", "32", "--num-layers", "2", "--num-heads", "2",
]  # fmt: skip


def make_split(folder: Path) -> Path:
    return prepare_documents(folder) / "test"


def make_model(folder: Path, seq_length: int = 192, seed: int = 0) -> Path:
    """Random weights, large enough for the model to have opinions."""
    model = GPT2(ModelConfig(257, seq_length, 32, 2, 2))
    model.init_weights(torch.Generator().manual_seed(seed))
    folder.mkdir()
    state = {name: tensor * 6 if tensor.dim() > 1 else tensor for name, tensor in model.state_dict().items()}
    save_model(folder, model.config, state, GenerationSettings.ending_with(256))
    load_tokenizer("bytes").save(folder)
    return folder


def make_items(file: Path, count: int = 200) -> list[dict]:
    """Of the data set's two kinds, with marks of WikiHow's pages, letters beyond ASCII, contexts beyond 192 bytes, and
    endings of which nothing is left without the marks (not the first item's, which the harness looks at first)."""
    draw = random.Random(1)
    words = (
        "a naïve man [header] lifts the 🙂 bar [title] over his Head  twice [substeps] and smiles. then stops".split(
            " "
        )
    )

    def text(least: int, most: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(least, most)))

    items = [
        {
            "activity_label": text(1, 3),
            "ctx_a": text(1, 40),
            "ctx_b": text(0, 3),
            "endings": [("" if number else "a ") + text(1, 9) + draw.choice([".", "", " [step]"]) for _ in range(4)],
            "label": draw.choice([number % 4, str(number % 4)]),
        }
        for number in range(count)
    ]
    file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return items


def reference_losses(model_folder: Path, split: Path) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses and tokens of each window of the whole split, one after the other."""
    model = GPT2LMHeadModel.from_pretrained(model_folder).double().eval()
    length = model.config.n_positions
    stream = TokenStream(split)
    tokens = torch.from_numpy(stream.read(0, stream.length).astype(np.int64))
    sums, counts = [], []
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, length):
            window = tokens[start : start + length + 1]
            logits = model(window[None, :-1]).logits[0]
            sums.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item())
            counts.append(len(window) - 1)
    return np.array(sums), np.array(counts)


def plain_text(text: str) -> str:
    """HellaSwag's preprocessing, letter by letter."""
    text = text.strip().replace(" [title]", ". ")
    kept = ""
    while text:
        end = text.find("]") if text[0] == "[" else -1
        if end < 0:
            kept, text = kept + text[0], text[1:]
        else:
            text = text[end + 1 :]
    return kept.replace("  ", " ")


def reference_log_probabilities(model_folder: Path, items: list[dict]) -> tuple[np.ndarray, float, float]:
    """Of each ending, one forward pass each; acc and acc_norm."""
    model, tokenizer = (
        GPT2LMHeadModel.from_pretrained(model_folder).double().eval(),
        AutoTokenizer.from_pretrained(model_folder),
    )
    longest = model.config.n_positions
    rows, right, right_norm = [], 0, 0
    for item in items:
        context = plain_text(item["activity_label"] + ": " + item["ctx_a"] + " " + item["ctx_b"].capitalize())
        endings = [plain_text(ending) for ending in item["endings"]]
        row = []
        for ending in endings:
            whole = tokenizer.encode(context + " " + ending)
            count = len(whole) - len(tokenizer.encode(context.rstrip()))
            whole = whole[-(longest + 1) :]
            with torch.no_grad():
                log_probabilities = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
            row.append(sum(log_probabilities[-count + i, whole[-count + i]].item() for i in range(count)))
        label = int(item["label"])
        right += max(range(4), key=lambda i: row[i]) == label
        right_norm += max(range(4), key=lambda i: row[i] / len(endings[i]) if endings[i] else -math.inf) == label
        rows.append(row)
    return np.array(rows), right / len(items), right_norm / len(items)
