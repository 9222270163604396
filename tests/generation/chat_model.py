"""A small model that was trained to chat, for tests: it names what has a colour, and ends its answer."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from gpt2xla.chat.conversations import Message
from gpt2xla.chat.template import ChatTemplate
from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.config import ModelConfig
from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.loss import IGNORED_LABEL

ANSWERS = {"red": "an apple", "blue": "the sky", "green": "a leaf", "white": "snow"}
SEQ_LENGTH, END = 128, 256
TURN = 43  # at most so many tokens has one of its turns


def chat_tokenizer() -> Tokenizer:
    template = ChatTemplate.named("chatml")
    tokenizer = load_tokenizer("bytes").with_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer.with_chat_template(template.source)


def train(folder: Path, steps: int = 60) -> Path:
    """Write the model, 2 layers wide 64, with its tokenizer to `folder`, as a checkpoint's is."""
    torch.manual_seed(0)
    tokenizer, template = chat_tokenizer(), ChatTemplate.named("chatml")
    asked = list(itertools.permutations(ANSWERS, 2))
    ids, labels = torch.full((len(asked), 96), END), torch.full((len(asked), 96), IGNORED_LABEL)
    for row, words in enumerate(asked):
        turns = [(Message("user", word), Message("assistant", ANSWERS[word])) for word in words]
        found, trained = template.encode(tokenizer, [message for turn in turns for message in turn])
        ids[row, : len(found)] = torch.from_numpy(found.astype(int))
        labels[row, : len(found) - 1] = ids[row, 1 : len(found)].where(torch.from_numpy(trained[1:]), IGNORED_LABEL)
    config = ModelConfig(vocab_size=320, seq_length=SEQ_LENGTH, d_model=64, num_layers=2, num_heads=4)
    model = GPT2(config)
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        loss, count = model(ids, labels)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True, exist_ok=True)
    hf.save_model(folder, config, model.state_dict(), GenerationSettings.of(tokenizer))
    hf.save_tokenizer(folder, tokenizer, SEQ_LENGTH)
    return folder
