"""Prompts from a file, continuations to a file of JSON lines, and special tokens spelled in prompts."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt2xla.config import ModelConfig
from gpt2xla.data.special_tokens import SpecialTokensInText, SpelledTokens, shortened, warning
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.errors import InputError, user_error
from gpt2xla.generation.continuation import Prompt, text_prompt
from gpt2xla.generation.settings import GenerationSettings

# What the JSON line of a prompt begins with, and the prompt.
Entry = tuple[dict[str, Any], Prompt]
_MAX_NEW_TOKENS = 100


def read_lines(file: Path) -> list[tuple[int, str]]:
    """Read one prompt from each line of `file`, without its line ending or a byte order mark, with the line's number from 1;
    blank lines are left out. Raises InputError if the file cannot be read, is not UTF-8 or holds no prompt."""
    with user_error(f"--prompts-file {file}"):
        content = file.read_bytes()
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts-file {file} is not UTF-8 (byte {error.start}); convert it") from None
    prompts = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise InputError(f"--prompts-file {file} holds no prompt; write one on each line")
    return prompts


class TextReader:
    """Makes prompts of texts that are to be continued. Special tokens that they spell are read as text, with one warning, or
    as tokens, or the text is refused.

    Attributes:
        tokenizer: reads their special tokens as `special_tokens` says.
        stop_ids: ids that end a text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: ModelConfig,
        settings: GenerationSettings,
        max_new_tokens: int | None,
        special_tokens: SpecialTokensInText,
        option: str = "--prompt",
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    ) -> None:
        self._spelled = SpelledTokens(token for token, is_special in tokenizer.added.items() if is_special)
        self._special_tokens, self._option, self._say = special_tokens, option, say
        self._has_warned = False
        self.tokenizer = tokenizer.reading_special_tokens() if special_tokens == "as-ids" else tokenizer
        self.stop_ids = settings.stop_ids(tokenizer.eot_id)
        self._model, self._settings, self._max_new_tokens = model, settings, max_new_tokens or _MAX_NEW_TOKENS

    def prompt(self, text: str) -> Prompt:
        """Return the prompt. Raises InputError if its special tokens are refused, or as `text_prompt` does."""
        self._check(text)
        vocab_size = self._model.real_vocab_size
        return text_prompt(self.tokenizer, text, self._max_new_tokens, self._settings, vocab_size, self._option)

    def _check(self, text: str) -> None:
        if self._special_tokens == "as-ids" or not (counts := self._spelled.count(text)):
            return
        if self._special_tokens == "refuse":
            raise InputError(
                f"{self._option} {shortened(text)!r} spells the special token {next(iter(counts))}; remove it, or choose "
                "--special-tokens-in-text as-text or as-ids"
            )
        if not self._has_warned:
            self._say(warning(counts, f"{self._option} {shortened(text)!r}"))
            self._has_warned = True

    def entries(self, file: Path) -> list[Entry]:
        """Return the prompts of a file, one a line. Raises InputError as `prompt` and `read_lines` do."""
        return [({"prompt": text}, self.prompt(text)) for _, text in read_lines(file)]


@contextlib.contextmanager
def json_lines(output: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that writes an object as one line, to the file `output` or, if that is None, to standard output.
    Until all lines are written, and after a failure, they are in OUTPUT.partial, and an older file stays as it was."""
    if output is None:
        yield lambda line: print(json.dumps(line, ensure_ascii=False), file=sys.stdout, flush=True)
        return
    partial = Path(f"{output}.partial")
    with user_error(f"--output {output}"):
        stream = partial.open("w", encoding="utf-8", buffering=1)
    with stream:
        yield lambda line: print(json.dumps(line, ensure_ascii=False), file=stream)
    with user_error(f"--output {output}"):
        os.replace(partial, output)
