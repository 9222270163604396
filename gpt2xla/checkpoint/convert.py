"""Converts any model that can be loaded here to a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.checkpoint.loading import load_weights, locate
from gpt2xla.checkpoint.model_card import MODEL_CARD, card_of_model
from gpt2xla.config import ModelConfig
from gpt2xla.data.tokenizer import Tokenizer, check_ids, load_tokenizer
from gpt2xla.data.tokenizer_folder import has_tokenizer, model_folder
from gpt2xla.errors import InputError, as_named, counted, user_error
from gpt2xla.generation.settings import settings_of


def convert(name: str, output: Path, tokenizer: str | None, say: Callable[[str], None] = print) -> None:
    """Write the model `name`, as --from-checkpoint understands it, to the new folder `output`, in fp32.

    The folder gets the requested tokenizer, otherwise the one beside the model, if there is one. The model's generation
    settings are kept. Raises InputError if there is no such model, its tokenizer does not fit, or `output` exists already.
    """
    if output.exists():
        raise InputError(f"--output-dir {output} exists already; choose another, or move it away")
    source = locate(name)
    config, weights = load_weights(source)
    found, why = _choose_tokenizer(config, source, tokenizer)
    settings = settings_of(source, found)
    partial = output.with_name(f".{output.name}.partial")
    with user_error(f"--output-dir {output}"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        hf.save_model(partial, config, weights, settings)
        if found:
            hf.save_tokenizer(partial, found, config.seq_length)
        card = card_of_model(output.name, name, config, weights, found)
        (partial / MODEL_CARD).write_text(card, encoding="utf-8")
        partial.rename(output)
    head, biases = "tied" if config.tie_weights else "untied", "biases" if config.bias else "no biases"
    say(
        f"{as_named(source)}: {counted(config.num_layers, 'layer')}, d_model {config.d_model}, "
        f"{counted(config.num_heads, 'head')}, {config.real_vocab_size:,} ids, "
        f"{config.seq_length} positions, {config.activation}, {head} head, {biases}"
    )
    for note in weights.notes:
        say(note)
    say(f"tokenizer: {why}")
    say(f"wrote {output}; from_pretrained, generate.py --model and --from-checkpoint read it")


def _choose_tokenizer(config: ModelConfig, source: Path, asked: str | None) -> tuple[Tokenizer | None, str]:
    """Return the tokenizer, if there is one, and which one it is, as text for the user."""
    if asked:
        tokenizer = load_tokenizer(asked)
        check_ids(tokenizer, tokenizer.vocab_size, config.real_vocab_size, source)
        return tokenizer, f"{tokenizer.name}, as requested"
    if has_tokenizer(folder := model_folder(source)):
        return load_tokenizer(str(folder)), "the one beside the model"
    return (
        None,
        f"none written, because {as_named(source)} has none; add one with --tokenizer, such as gpt2 for OpenAI's",
    )
