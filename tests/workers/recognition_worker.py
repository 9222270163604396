"""Run by test_recognition.py in its own process: likelihoods of words on XLA and on plain torch, and programs compiled.

Prints one JSON object.
"""

import json

import torch
from evals.sketch_data import WORDS, format_of, pictures

from gpt2xla.config import ModelConfig
from gpt2xla.evals.recognition import word_log_probabilities
from gpt2xla.generation.decoding import generate
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.xla.compiles import count_compiles
from gpt2xla.runtime.xla.device import XlaDevice

ROWS, WIDTH = 4, 64


def main() -> None:
    device, found = XlaDevice(), {}
    for kind in ("pieces", "bytes"):
        format = format_of(kind)
        config = ModelConfig(
            vocab_size=format.tokenizer.vocab_size, seq_length=96, d_model=32, num_layers=2, num_heads=2
        )
        torch.manual_seed(3)
        plain, on_xla = GPT2(config), GPT2(config)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        on_xla.load_state_dict(plain.state_dict())
        device.setup_model(on_xla)
        prompts = [format.drawing_prompt(word).tolist() for word in WORDS[:ROWS]]
        list(generate(on_xla, prompts, 3, width=WIDTH, device=device))
        drawn, compiles = [picture for picture, _ in pictures(3, format.size)], [count_compiles()]
        on_device = word_log_probabilities(on_xla, format, drawn, rows=ROWS, width=WIDTH, device=device)
        compiles.append(count_compiles())
        on_host = word_log_probabilities(plain, format, drawn)
        found[kind] = {"xla": on_device.tolist(), "torch": on_host.tolist(), "compiles": compiles}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
