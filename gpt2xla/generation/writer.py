"""Continues prompts with one model and one set of options, and writes the texts: as they grow, or as JSON lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import counted
from gpt2xla.generation.continuation import Continuation, Prompt, continue_prompts
from gpt2xla.generation.sampling import SamplingConfig
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Device


def _nothing(piece: str) -> None: ...


@dataclass(frozen=True)
class Writer:
    """Continues prompts, `samples` times each: number j, from 0, draws with the seed + j.

    Attributes:
        stop_ids, stop: see `continue_prompts`.
        is_chat: whether texts are answers, which should end by themselves, to a conversation that may grow."""

    model: GPT2
    device: Device
    tokenizer: Tokenizer
    sampling: SamplingConfig
    stop_ids: Collection[int]
    stop: Sequence[str] = ()
    samples: int = 1
    is_chat: bool = False

    def show(self, prompt: Prompt, seed: int, show: Callable[[str], None] = _nothing) -> None:
        """Print the text that begins with `prompt`, one sample as it grows. Its pieces are given to `show` too."""

        def show_piece(piece: str) -> None:
            show(piece)
            print(piece, end="", flush=True)

        # On XLA each width of prompts is another program.
        width = self.model.config.seq_length if self.is_chat else 0
        texts = self._continued([prompt], seed, width=width, show=show_piece if self.samples == 1 else _nothing)
        if self.samples > 1:
            for number, text in enumerate(texts, start=1):
                print(f"--- sample {number} of {self.samples} ---\n{text.prompt}{text.text}")
            return
        print()
        if self.is_chat and (note := _note(prompt, texts[0])):
            print(note, file=sys.stderr)

    def write(
        self,
        entries: Sequence[tuple[dict[str, Any], Prompt]],
        batch_size: int,
        seed: int,
        write: Callable[[dict[str, Any]], None],
    ) -> None:
        """Give `write` one object per entry: what the entry begins with, and the texts of its prompt."""
        # On XLA a smaller last batch, or one of shorter prompts, would be another program.
        rows = min(batch_size, len(entries)) * self.samples
        width = max((len(prompt.ids) for _, prompt in entries), default=0)
        for start in range(0, len(entries), batch_size):
            batch = entries[start : start + batch_size]
            texts = iter(self._continued([prompt for _, prompt in batch], seed, rows, width))
            for head, prompt in batch:
                samples = [next(texts) for _ in range(self.samples)]
                write(head | record(prompt, samples))

    def _continued(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        rows: int = 0,
        width: int = 0,
        show: Callable[[str], None] = _nothing,
    ) -> list[Continuation]:
        return continue_prompts(
            self.model, self.tokenizer, prompts, self.sampling, stop_ids=self.stop_ids, seed=seed, samples=self.samples,
            stop=self.stop, rows=rows, width=width, device=self.device, show=show,
        )  # fmt: skip


def _note(prompt: Prompt, answer: Continuation) -> str:
    if answer.is_cut:
        limit = counted(prompt.max_new_tokens, "token")
        return f"note: cut after {limit}, the limit of --max-new-tokens or of the context"
    return "" if answer.text.strip() else "note: the model ended its answer at once"


def record(prompt: Prompt, samples: Sequence[Continuation]) -> dict[str, Any]:
    """Return what a JSON line holds about the texts of one prompt; each of `texts` begins where the prompt ends. It ended by
    itself ("stop") or was cut ("length")."""
    return {
        "texts": [sample.text for sample in samples],
        "finish_reasons": ["length" if sample.is_cut else "stop" for sample in samples],
        "prompt_tokens": len(prompt.ids),
        "new_tokens": [sample.tokens for sample in samples],
    }
