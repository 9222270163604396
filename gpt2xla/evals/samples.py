"""Sample texts that a model writes during training, to look at beside its losses."""

from __future__ import annotations

from functools import partial

from gpt2xla.config import RunConfig
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import InputError
from gpt2xla.generation.continuation import continue_texts, text_prompt
from gpt2xla.generation.devices import for_generation
from gpt2xla.generation.prompt_file import PromptReader
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
        self.prompt, self.seed = config.train.sample_prompt, config.general.seed
        self.model = model
        if runtime.devices != runtime.world_size:
            raise InputError("--sample-interval does not work with --spmd; leave one of them out")
        if tokenizer is None:
            raise InputError("--sample-interval: there is no tokenizer to write text with; name one with --tokenizer")
        tell = partial(say, error=True) if runtime.is_main else lambda text: None
        self.device = for_generation(runtime, model, tell)
        reader = PromptReader(tokenizer, config.train.special_tokens_in_text, "--sample-prompt", tell)
        reader.checked(self.prompt)
        self.tokenizer, self.settings, vocab_size = reader.tokenizer, settings, config.model.real_vocab_size
        if not self.prompt and settings.start_id(tokenizer, vocab_size) is None:
            raise InputError(
                "--sample-interval: the tokenizer has no end-of-text token to begin after; add --sample-prompt"
            )
        prompt = text_prompt(self.tokenizer, self.prompt, _NEW_TOKENS, settings, vocab_size)
        # A text that outgrows the context is read again, which on XLA would be another program.
        self.new_tokens = min(_NEW_TOKENS, config.model.seq_length - len(prompt.ids))
        if self.new_tokens < 1:
            raise InputError(
                f"--sample-prompt has at least as many tokens as --seq-length {config.model.seq_length}; shorten it"
            )

    def run(self) -> str:
        """Return the prompt and its continuation. Every process computes it, and none waits for another; the random numbers
        of training stay as they are."""
        with self.device.autocast():  # the outermost one keeps cast weights, from token to token
            (text,) = continue_texts(
                self.model, self.tokenizer, [self.prompt], self.new_tokens, USUAL, settings=self.settings,
                seed=self.seed, device=self.device,
            )  # fmt: skip
        self.model.train()
        return text.prompt + text.text
