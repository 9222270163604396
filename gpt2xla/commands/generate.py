"""Continue text with a GPT-2: `python generate.py --model checkpoints --prompt "Once upon a time"`."""

from __future__ import annotations

import itertools
import secrets
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from gpt2xla.cli import parse_options
from gpt2xla.config import MODEL_HELP, PRECISION_ALIASES, TOKENIZER_HELP, Precision, option, paths
from gpt2xla.errors import InputError


@dataclass(frozen=True)
class GenerateConfig:
    """Generation"""

    model: str = option(MISSING, MODEL_HELP, is_path=True, check=paths.check_model)
    tokenizer: str | None = option(
        None, f"{TOKENIZER_HELP} (default: the model's own)", is_path=True, check=paths.check_tokenizer
    )
    prompt: str | None = option(None, "text to continue (default: ask for prompts until end of input)")
    prompts_file: str | None = option(None, "file of prompts to continue, one a line; writes JSON lines", is_path=True)
    output: str | None = option(
        None, "with --prompts-file: file for the JSON lines (default: standard output)", is_path=True
    )
    batch_size: int = option(8, "with --prompts-file: prompts computed side by side, each with its --num-samples")
    num_samples: int = option(1, "continuations of each prompt; number j, from 0, draws with --seed + j")
    seed: int | None = option(
        None, "repeat the texts that this seed gave (default: a new seed each time, which is printed to standard error)"
    )
    max_new_tokens: int = option(100, "longest continuation, in tokens")
    temperature: float = option(
        0.8, "below 1 plainer, above 1 wilder, 0 always the likeliest token; 1 is the model itself"
    )
    top_k: int = option(40, "draw from the k likeliest tokens; 0 is off")
    top_p: float = option(1.0, "draw from the likeliest tokens that together reach this probability; 1 is off")
    repetition_penalty: float = option(1.0, "make tokens that are in the text less likely; 1 is off, 1.2 is usual")
    stop: tuple[str, ...] = option(
        (),
        "end before the first of these texts that the new text holds; it also ends at the model's end-of-text tokens",
    )
    special_tokens_in_text: Literal["as-text", "as-ids", "refuse"] = option(
        "as-text",
        "special tokens, such as <|user|>, that a prompt spells: as-text takes the letters, as-ids the tokens, as "
        "transformers does, refuse stops there",
    )
    device: Literal["auto", "cpu", "cuda", "mps", "xla"] = option("auto", "auto: cuda, else mps, else cpu")
    mixed_precision: Precision = option(
        "auto",
        "type of the weights and of all that is computed from them; none: fp32; auto: as in training, bf16 on TPUs and GPUs "
        "that have it, fp16 on other GPUs with fast fp16, otherwise none",
        aliases=PRECISION_ALIASES,
        other_names=("dtype",),
    )

    def check(self) -> None:
        for name in ("max_new_tokens", "num_samples", "batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: choose a number of at least 1")
        if self.temperature == 0 and self.num_samples > 1:
            raise InputError(
                f"--num-samples {self.num_samples}: all would be the same with --temperature 0; leave one of the two out"
            )
        if self.seed is not None and not 0 <= self.seed < 2**63 - self.num_samples:
            raise InputError(f"--seed {self.seed}: choose a number from 0 to 2^63 - 1 - --num-samples")
        if "" in self.stop:
            raise InputError("--stop is empty; give the text to stop at")
        if self.prompts_file is not None and self.prompt is not None:
            raise InputError("--prompt and --prompts-file exclude each other; leave one out")
        if any("\ud800" <= character <= "\udfff" for character in self.prompt or ""):  # Python's form of stray bytes
            raise InputError("--prompt is not UTF-8; convert it, or set a UTF-8 locale")
        if self.output is not None and self.prompts_file is None:
            raise InputError("--output goes with --prompts-file; add it, or redirect standard output")
        if self.output is not None and self.prompts_file is not None:
            output, prompts = Path(self.output), Path(self.prompts_file)
            if self.output == "" or output.is_dir():
                raise InputError(f"--output {self.output!r} is no file; name one for the JSON lines")
            if not output.parent.is_dir():
                raise InputError(f"--output {output}: there is no folder {output.parent}; make it, or choose another")
            if output.exists() and prompts.exists() and output.samefile(prompts):
                raise InputError(f"--output {output} is the --prompts-file itself; choose another")


def main() -> None:
    options = parse_options(GenerateConfig, "Continue text with a GPT-2.")
    options.check()
    from gpt2xla.checkpoint.run_folder import refuse_unfinished

    refuse_unfinished(options.model)  # before torch is imported
    from gpt2xla.checkpoint.loading import build_model, load_weights, locate
    from gpt2xla.data.tokenizer import find_tokenizer
    from gpt2xla.data.tokenizer_folder import model_folder
    from gpt2xla.generation.continuation import Continuation, continue_texts, prompt_ids
    from gpt2xla.generation.devices import move
    from gpt2xla.generation.prompt_file import PromptReader, json_lines, read_prompts, record
    from gpt2xla.generation.sampling import SamplingConfig
    from gpt2xla.generation.settings import GenerationSettings

    sampling = SamplingConfig(options.temperature, options.top_k, options.top_p, options.repetition_penalty)
    sampling.check()
    prompts = read_prompts(Path(options.prompts_file)) if options.prompts_file is not None else []
    source = locate(options.model)
    model_config, weights = load_weights(source)
    tokenizer = find_tokenizer(options.tokenizer, source, model_config.real_vocab_size)
    reader = PromptReader(tokenizer, options.special_tokens_in_text)
    tokenizer = reader.tokenizer
    folder = model_folder(source)
    settings = GenerationSettings.load(folder) if folder.is_dir() else GenerationSettings.of(tokenizer)
    for prompt in prompts if options.prompt is None else [options.prompt]:  # an empty one may be impossible
        prompt_ids(tokenizer, reader.checked(prompt), settings, model_config.real_vocab_size)
    for note in weights.notes:
        print(note, file=sys.stderr)
    if unused := settings.unused():
        shown = ", ".join(f"{key} {value}" for key, value in unused.items())
        print(f"note: only flags count here, not the model's generation_config.json: {shown}", file=sys.stderr)
    model = build_model(model_config, weights, source)
    device = move(model, options.device, options.mixed_precision)
    seed = options.seed if options.seed is not None else draw_seed(options)

    def continued(
        texts: list[str], seed: int, rows: int = 0, show: Callable[[str], None] = lambda text: None
    ) -> list[Continuation]:
        return continue_texts(
            model, tokenizer, texts, options.max_new_tokens, sampling, settings=settings, seed=seed,
            samples=options.num_samples, stop=options.stop, rows=rows, device=device, show=show,
        )  # fmt: skip

    def show_continued(prompt: str, seed: int) -> None:
        if options.num_samples == 1:
            continued([prompt], seed, show=lambda text: print(text, end="", flush=True))
            print()
            return
        for number, text in enumerate(continued([prompt], seed), start=1):
            print(f"--- sample {number} of {options.num_samples} ---\n{text.prompt}{text.text}")

    if prompts:
        with json_lines(options.output) as write:
            for start in range(0, len(prompts), options.batch_size):
                batch = prompts[start : start + options.batch_size]
                # On XLA a smaller last batch would be another program.
                texts = continued(batch, seed, rows=min(options.batch_size, len(prompts)) * options.num_samples)
                for number, prompt in enumerate(batch):
                    write(record(prompt, texts[number * options.num_samples :][: options.num_samples]))
    elif options.prompt is not None:
        show_continued(options.prompt, seed)
    else:
        seeds = itertools.count(seed, options.num_samples)  # the same prompt again gives another text
        ask(lambda prompt: show_continued(reader.checked(prompt), next(seeds)))


def draw_seed(options: GenerateConfig) -> int:
    """Return a new seed. It is printed, unless it changes nothing."""
    seed = secrets.randbelow(10**9)
    if options.temperature > 0:
        texts = "this text" if options.prompt is not None and options.num_samples == 1 else "these texts"
        print(f"seed {seed}: add --seed {seed} to get {texts} again", file=sys.stderr, flush=True)
    return seed


def ask(continue_text: Callable[[str], None]) -> None:
    """Read prompts until end of input. Ctrl-C stops the current text or line and asks again."""
    while True:
        try:
            prompt = input(">> ")
            if prompt.strip():
                continue_text(prompt)
        except InputError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except UnicodeError:
            print("that line is not UTF-8", file=sys.stderr)
        except EOFError:
            print()
            return
