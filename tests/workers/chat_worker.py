"""Run by test_chat.py in its own process: a conversation on XLA and on plain torch, and the programs compiled until each
answer; then questions in batches.

Prints one JSON object.
"""

import json
import sys
from pathlib import Path

from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.generation.dialogue import ChatReader, Dialogue
from gpt2xla.generation.sampling import GREEDY
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.generation.writer import Writer
from gpt2xla.runtime.one_device import OneDevice
from gpt2xla.runtime.xla.compiles import count_compiles
from gpt2xla.runtime.xla.device import XlaDevice


def main(folder: str) -> None:
    config, weights = load_weights(Path(folder))
    tokenizer, settings = load_tokenizer(folder), GenerationSettings.load(Path(folder))
    device, plain, compiles = XlaDevice(), build_model(config, weights, Path(folder)), []
    on_xla = build_model(config, weights, Path(folder))
    device.setup_model(on_xla)
    prompts: dict[str, list[int]] = {}
    answers: dict[str, list[str]] = {}
    for name, model, where in (("torch", plain, OneDevice(plain.wte.weight.device)), ("xla", on_xla, device)):
        reader = ChatReader.of(tokenizer, config, settings, 20, "", "the model")
        writer = Writer(model, where, tokenizer, GREEDY, reader.stop_ids, is_chat=True)
        dialogue, prompts[name], answers[name] = Dialogue(reader), [], []
        for question in ["red", "blue", "x" * 60, "green", "y" * 80, "white"]:
            prompt, pieces = dialogue.asked(question).prompt, []
            writer.show(prompt, 0, pieces.append)
            dialogue.answered("".join(pieces))
            prompts[name].append(len(prompt.ids))
            answers[name].append("".join(pieces))
            if name == "xla":
                compiles.append(count_compiles())
    entries = [({}, reader.prompt(question)) for question in ["red", "blue", "z" * 70, "green", "white"]]
    lines: list[dict] = []
    writer.write(entries, 2, 0, lines.append)
    batches = [text for line in lines for text in line["texts"]]
    result = {"prompts": prompts["xla"], "compiles": compiles, "answers": answers, "batches": batches}
    print(json.dumps(result | {"compiles with batches": count_compiles()}))


if __name__ == "__main__":
    main(sys.argv[1])
