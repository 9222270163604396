#!/usr/bin/env python
"""Continue text with a GPT-2: `python generate.py --model checkpoints --prompt "Once upon a time"`."""

import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass

from gpt2xla.cli import parse_options
from gpt2xla.config import option
from gpt2xla.exits import exit_code


@dataclass(frozen=True)
class GenerateConfig:
    """Generation"""

    model: str = option(MISSING, "checkpoint folder, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, or a .pt file")
    tokenizer: str | None = option(
        None, "a tiktoken name, 'bytes' or a tokenizer.json (default: the model's own, else gpt2)"
    )
    prompt: str | None = option(None, "text to continue (default: ask for one again and again)")
    seed: int = option(0, "seed of the draws")
    max_new_tokens: int = option(100, "longest continuation, in tokens")
    temperature: float = option(1.0, "above 1 flatter, below 1 sharper, 0 always the likeliest token")
    top_k: int = option(0, "draw from the k likeliest tokens; 0 is off")
    top_p: float = option(1.0, "draw from the likeliest tokens that together reach this probability; 1 is off")


def main() -> None:
    options = parse_options(GenerateConfig, "Continue text with a GPT-2.")
    import torch

    from gpt2xla.errors import InputError
    from gpt2xla.sampling import SamplingConfig, generate
    from gpt2xla.start import build_model, load_weights, locate
    from gpt2xla.tokenizer import TextStream, has_tokenizer, load_tokenizer

    sampling = SamplingConfig(options.temperature, options.top_k, options.top_p)
    sampling.check()
    if options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {options.max_new_tokens}: choose a number of at least 1")
    source = locate(options.model)
    model_config, weights = load_weights(source)
    model = build_model(model_config, weights, source)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(options.tokenizer or (str(source) if has_tokenizer(source) else "gpt2"))
    if tokenizer.vocab_size > model_config.real_vocab_size:
        raise InputError(
            f"--tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids but {source} only {model_config.real_vocab_size}; "
            "name the tokenizer that the model was trained with"
        )
    generator = torch.Generator().manual_seed(options.seed)

    def continue_text(prompt: str) -> None:
        start = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
        ids = tokenizer.encode(prompt) or start
        if not ids:
            raise InputError(
                "--prompt is empty, and the tokenizer has no end-of-text token to start from; give some text"
            )
        stream = TextStream(tokenizer, ids)
        print(stream.text, end="", flush=True)
        for token in generate(
            model, ids, options.max_new_tokens, sampling, generator,
            vocab_size=tokenizer.vocab_size, stop_id=tokenizer.eot_id,
        ):  # fmt: skip
            print(stream.add(token), end="", flush=True)
        print(stream.rest())

    if options.prompt is not None:
        continue_text(options.prompt)
    else:
        ask(continue_text)


def ask(continue_text: Callable[[str], None]) -> None:
    """Read prompts until end of input; Ctrl-C stops the text or line at hand and asks anew."""
    while True:
        try:
            prompt = input(">> ")
            if prompt.strip():
                continue_text(prompt)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


if __name__ == "__main__":
    sys.exit(exit_code(main))
