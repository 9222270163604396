"""Run by test_generation.py in its own process: greedy texts, a picture and looks inside on XLA and on plain torch, and
programs compiled.

Prints one JSON object.
"""

import json

import numpy as np
import torch

from gpt2xla.config import ModelConfig
from gpt2xla.evals.inside import look_inside
from gpt2xla.generation.decoding import generate
from gpt2xla.generation.drawing import draw
from gpt2xla.generation.sampling import GREEDY
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.one_device import OneDevice
from gpt2xla.runtime.xla.compiles import count_compiles
from gpt2xla.runtime.xla.device import XlaDevice
from gpt2xla.sketches.format import SketchFormat
from gpt2xla.sketches.tokenizer import train_tokenizer

CASES = {
    "20 tokens": ([3, 1, 4], 20, 0),
    "200 tokens": ([3, 1, 4], 200, 0),
    "another prompt": (list(range(29)), 50, 0),
    "past the context": (list(range(20)), 300, 0),
    "a conversation": (list(range(10)), 20, 256),
    "which grows": (list(range(61)) * 3, 20, 256),
}


def main() -> None:
    format = SketchFormat(train_tokenizer({"cat": 1}, 24, 520), 24, ["cat"])
    config = ModelConfig(vocab_size=520, seq_length=256, d_model=32, num_layers=2, num_heads=4)
    torch.manual_seed(3)
    plain, on_xla = GPT2(config), GPT2(config)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    on_xla.load_state_dict(plain.state_dict())
    device = XlaDevice()
    device.setup_model(on_xla)
    compiles, texts = {}, {"torch": {}, "xla": {}}
    for name, (prompt, count, width) in CASES.items():
        texts["torch"][name] = [token for (token,) in generate(plain, [prompt], count)]
        texts["xla"][name] = [token for (token,) in generate(on_xla, [prompt], count, width=width, device=device)]
        compiles[name] = count_compiles()
    drawn = {
        name: [picture.tolist() for picture in draw(model, format, ["cat"], GREEDY, [0], device=where)]
        for name, model, where in (("torch", plain, None), ("xla", on_xla, device))
    }
    compiles["a drawing"] = count_compiles()
    before, programs, difference = count_compiles(), {}, 0.0
    on_host, plain.end_of_text, on_xla.end_of_text = OneDevice(torch.device("cpu")), 5, 5
    for length in (3, 128, 129, 256, 90):
        ids = [token * 7 % 61 for token in range(length)]
        expected, seen = look_inside(plain, ids, on_host), look_inside(on_xla, ids, device)
        programs[length] = count_compiles() - before
        for name in ("log_probs", "candidate_log_probs", "attention"):
            gaps = abs(getattr(expected, name) - getattr(seen, name))
            difference = max(difference, float(np.nanmax(gaps)))
    inside = {"programs": programs, "difference": difference}
    print(json.dumps(texts | {"drawn": drawn, "compiles": compiles, "inside": inside}))


if __name__ == "__main__":
    main()
