"""Sample texts that a model writes during training, to look at beside its losses."""

from __future__ import annotations

import dataclasses
from functools import partial

from gpt2xla.config import RunConfig
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import InputError
from gpt2xla.generation.continuation import continue_prompts
from gpt2xla.generation.devices import for_generation
from gpt2xla.generation.prompt_file import TextReader
from gpt2xla.generation.sampling import USUAL
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.logs.console import say
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Runtime

_NEW_TOKENS = 64


class Sampler:
    """Continues --sample-prompt, each time with the same random numbers: only what the model has learned changes the sample.

    Raises InputError if there is no tokenizer, or the prompt leaves no room in the model's context, or one process computes
    for several devices: XLA's partitioner aborts on the cache's writes when it splits a batch of one text."""

    def __init__(
        self,
        config: RunConfig,
        model: GPT2,
        tokenizer: Tokenizer | None,
        settings: GenerationSettings,
        runtime: Runtime,
    ) -> None:
        self.model, self.seed, text = model, config.general.seed, config.train.sample_prompt
        if runtime.devices != runtime.world_size:
            raise InputError("--sample-interval does not work with --spmd; leave one of them out")
        if tokenizer is None:
            raise InputError("--sample-interval: there is no tokenizer to write text with; name one with --tokenizer")
        tell = partial(say, error=True) if runtime.is_main else lambda text: None
        self.device = for_generation(runtime, model, tell)
        if not text and settings.start_id(tokenizer, config.model.real_vocab_size) is None:
            raise InputError(
                "--sample-interval: the tokenizer has no end-of-text token to begin after; add --sample-prompt"
            )
        special = config.train.special_tokens_in_text
        self.reader = TextReader(tokenizer, config.model, settings, _NEW_TOKENS, special, "--sample-prompt", tell)
        prompt = self.reader.prompt(text)
        # A text that outgrows the context is read again, which on XLA would be another program.
        room = config.model.seq_length - len(prompt.ids)
        self.prompt = dataclasses.replace(prompt, max_new_tokens=min(_NEW_TOKENS, room))
        if room < 1:
            raise InputError(
                f"--sample-prompt has at least as many tokens as --seq-length {config.model.seq_length}; shorten it"
            )

    def run(self) -> str:
        """Return the prompt and its continuation. Every process computes it, and none waits for another; the random numbers
        of training stay as they are."""
        with self.device.autocast():  # the outermost one keeps cast weights, from token to token
            (text,) = continue_prompts(
                self.model, self.reader.tokenizer, [self.prompt], USUAL, stop_ids=self.reader.stop_ids, seed=self.seed,
                device=self.device,
            )  # fmt: skip
        self.model.train()
        return text.prompt + text.text
