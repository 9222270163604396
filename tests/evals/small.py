"""What the tests of evaluation share: a split of documents in bytes, models over it, HellaSwag-like items; and independent
scorers in float64, made of Hugging Face's model and tokenizer.
"""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from conftest import prepare_documents
from transformers import AutoTokenizer, GPT2LMHeadModel

from gpt2xla.checkpoint.formats.hugging_face import save_model
from gpt2xla.config import ModelConfig
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2

MODEL_FLAGS = [
    "--vocab-size", "257", "--seq-length", "192", "--d-model", "32", "--num-layers", "2", "--num-heads", "2",
]  # fmt: skip


def make_split(folder: Path) -> Path:
    return prepare_documents(folder) / "test"


def make_model(folder: Path, seq_length: int = 192, seed: int = 0, tokenizer: Tokenizer | None = None) -> Path:
    """Random weights, large enough for the model to have opinions. The tokenizer is that of bytes by default."""
    tokenizer = tokenizer or load_tokenizer("bytes")
    model = GPT2(ModelConfig(tokenizer.vocab_size, seq_length, 32, 2, 2))
    model.init_weights(torch.Generator().manual_seed(seed))
    folder.mkdir()
    state = {name: tensor * 6 if tensor.dim() > 1 else tensor for name, tensor in model.state_dict().items()}
    save_model(folder, model.config, state, GenerationSettings.ending_with(tokenizer.eot_id))
    tokenizer.save(folder)
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


# Made up; of three groups.
MMLU_SUBJECTS = {"formal_logic": 9, "us_foreign_policy": 6, "abstract_algebra": 12, "astronomy": 7}
_MMLU_EXAMPLES = 5


def make_mmlu(folder: Path) -> Path:
    """Questions in the form of the authors' data.tar, some longer than a model of 192 tokens, with blanks and lines as the
    real ones have, and in the form of the hub beside it."""
    draw = random.Random(2)
    words = 'which group of "order 7" is cyclic, naïve or the 🙂\nlarger one? it has no proper subgroup'.split(" ")

    def text(least: int, most: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(least, most)))

    (folder / "all").mkdir(parents=True)
    for split, counts in (("test", MMLU_SUBJECTS), ("dev", dict.fromkeys(MMLU_SUBJECTS, _MMLU_EXAMPLES))):
        (folder / "tar" / split).mkdir(parents=True)
        rows = []
        for subject, count in counts.items():
            own = [
                {
                    "question": draw.choice(["", " "]) + text(2, 45) + draw.choice(["", "\n"]),
                    "subject": subject,
                    "choices": [text(1, 5) + draw.choice(["", " "]) for _ in range(4)],
                    "answer": draw.randrange(4),
                }
                for _ in range(count)
            ]
            with (folder / "tar" / split / f"{subject}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([row["question"], *row["choices"], "ABCD"[row["answer"]]] for row in own)
            rows += own
        pq.write_table(pa.Table.from_pylist(rows), folder / "all" / f"{split}-00000-of-00001.parquet")
    return folder


def reference_mmlu(model_folder: Path, data: Path, shots: int) -> tuple[np.ndarray, dict[str, list[bool]]]:
    """Of each answer, one forward pass each; and by subject, which questions are answered rightly."""
    model = GPT2LMHeadModel.from_pretrained(model_folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def asked(row: dict) -> str:
        a, b, c, d = row["choices"]
        return row["question"].strip() + "\nA. " + a + "\nB. " + b + "\nC. " + c + "\nD. " + d + "\nAnswer:"

    test, dev = (
        pq.read_table(data / "all" / f"{split}-00000-of-00001.parquet").to_pylist() for split in ("test", "dev")
    )
    found, right = [], {subject: [] for subject in MMLU_SUBJECTS}
    for row in test:
        about = " ".join(row["subject"].split("_"))
        context = f"The following are multiple choice questions (with answers) about {about}.\n\n"
        for example in [one for one in dev if one["subject"] == row["subject"]][:shots]:
            context += asked(example) + " " + "ABCD"[example["answer"]] + "\n\n"
        context += asked(row)
        sums = []
        for letter in "ABCD":
            whole = tokenizer.encode(context + " " + letter)
            count = len(whole) - len(tokenizer.encode(context))
            whole = whole[-(model.config.n_positions + 1) :]
            with torch.no_grad():
                log_probabilities = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
            sums.append(sum(log_probabilities[i - count, whole[i - count]].item() for i in range(count)))
        found.append(sums)
        right[row["subject"]].append(max(range(4), key=lambda i: sums[i]) == row["answer"])
    return np.array(found), right


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
