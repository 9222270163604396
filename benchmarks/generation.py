#!/usr/bin/env python
"""How fast text is generated on a CPU or a CUDA GPU: ours, transformers' `generate` with its cache, and a loop without one.

    python benchmarks/generation.py
    python benchmarks/generation.py --device cuda

GPT-2 (124M) with random weights, the same for all; a prompt of 20 tokens and 100 new ones, greedy, in fp32 and in bf16. In
each round all run one after another, so that all see the same machine, and a round's ratios are taken between neighbours:
other programs on the machine disturb the rates, and the ratios less. Tokens per second are of the whole call, with the
reading of the prompt. In fp32 the tokens of all must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import GPT2LMHeadModel

from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.config import PRESETS, ModelConfig
from gpt2xla.generation.decoding import generate
from gpt2xla.generation.devices import for_generation
from gpt2xla.generation.packed_linear import pack_linears
from gpt2xla.generation.sampling import GREEDY
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Device
from gpt2xla.runtime.one_device import OneDevice

PROMPT_TOKENS, NEW_TOKENS = 20, 100
RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Tokens = list[int]


def without_cache(model: GPT2, prompt: Tokens) -> Tokens:
    """Every new token costs a forward pass over the whole text, with the logits of all its tokens."""
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            text.append(int(model.logits(torch.tensor([text], device=model.wte.weight.device))[0, -1].argmax()))
    return text[len(prompt) :]


def programs(
    folder: Path, kind: str, dtype: torch.dtype, prompt: Tokens
) -> tuple[dict[str, Callable[[], Tokens]], float]:
    """What is compared, and the seconds that ours takes to lay out its weights on a CPU."""
    config, weights = hf.load_model(folder)
    models = []
    for _ in range(2):
        model = GPT2(config).eval()
        model.load_state_dict(weights)
        models.append(model.to(kind, dtype))
    best, plain = models
    start = time.perf_counter()
    if kind == "cpu" and (reason := pack_linears(best)):
        raise SystemExit(f"nothing to measure: {reason}")
    seconds = time.perf_counter() - start
    device = OneDevice(torch.device(kind))
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval().to(kind)
    theirs.generation_config.eos_token_id = None  # never end early
    ids = torch.tensor([prompt], device=kind)

    def transformers_generate() -> Tokens:
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
        )
        return out[0, len(prompt) :].tolist()

    def ours(model: GPT2, device: Device) -> Tokens:
        return [token for (token,) in generate(model, [prompt], NEW_TOKENS, GREEDY, device=device)]

    fastest, without = for_generation(device, best, print), {"cpu": "torch's products", "cuda": "without CUDA graphs"}
    return {
        "ours": lambda: ours(best, fastest),
        "transformers": transformers_generate,
        f"ours, {without[kind]}": lambda: ours(plain, device),
        "no cache": lambda: without_cache(plain, prompt),
    }, seconds


def measure(folder: Path, kind: str, name: str, prompt: Tokens, rounds: int) -> dict:
    compared, packing = programs(folder, kind, DTYPES[name], prompt)
    texts = {program: run() for program, run in compared.items()}  # also the warm-up
    if name == "fp32":
        assert all(text == texts["ours"] for text in texts.values()), "not the same tokens"
    seconds: dict[str, list[float]] = {program: [] for program in compared}
    for number in range(rounds):
        for program, run in compared.items():
            start = time.perf_counter()
            run()
            seconds[program].append(time.perf_counter() - start)
        print(name, number + 1, {program: round(values[-1], 2) for program, values in seconds.items()}, flush=True)
    ratios = {
        program: [theirs / ours for theirs, ours in zip(values, seconds["ours"], strict=True)]
        for program, values in seconds.items()
    }
    return {
        "seconds": {program: spread(values) for program, values in seconds.items()},
        "ours is faster by": {program: spread(values) for program, values in ratios.items()},
        "same tokens as ours": {program: text == texts["ours"] for program, text in texts.items()},
        "packing_seconds": packing,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def table(results: dict) -> str:
    lines = ["| | tokens/s (least to most) | ours is faster by (least to most) |", "|---|---|---|"]
    for name, result in results["dtypes"].items():
        for program, seconds in result["seconds"].items():
            rate = {key: NEW_TOKENS / value for key, value in seconds.items()}
            ratio = result["ours is faster by"][program]
            lines.append(
                f"| {program}, {name} | {rate['median']:.1f} ({rate['most']:.1f} to {rate['least']:.1f}) | "
                f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f}) |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    kind, rounds, threads = (vars(parser.parse_args())[name] for name in ("device", "rounds", "threads"))
    torch.set_num_threads(threads)
    config = ModelConfig(**PRESETS["gpt2"])
    model = GPT2(config)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    prompt = torch.randint(0, config.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as folder:
        hf.save_model(Path(folder), config, model.state_dict(), GenerationSettings.ending_with(None))
        del model
        dtypes = {name: measure(Path(folder), kind, name, prompt, rounds) for name in DTYPES}
    machine = torch.cuda.get_device_name() if kind == "cuda" else platform.machine()
    results = {
        "date": str(date.today()), "machine": machine, "threads": threads, "rounds": rounds,
        "load_average": os.getloadavg()[1], "torch": torch.__version__, "transformers": transformers.__version__,
        "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "dtypes": dtypes,
    }  # fmt: skip
    suffix = (
        "_cuda" if kind == "cuda" else "" if threads == 2 else f"_{threads}_threads" if threads > 1 else "_1_thread"
    )
    (RESULTS / f"generation{suffix}.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / f"generation{suffix}.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
