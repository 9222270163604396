"""Continue text with a GPT-2: `python generate.py --model checkpoints --prompt "Once upon a time"`. With `--chat`, talk with
one that was trained to answer; with `--draw`, let one that was trained on sketches draw."""

from __future__ import annotations

import itertools
import secrets
import shutil
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gpt2xla.cli import parse_options
from gpt2xla.config import MODEL_HELP, PRECISION_ALIASES, TOKENIZER_HELP, Precision, option, paths, require_at_least
from gpt2xla.errors import InputError

if TYPE_CHECKING:  # --help does not wait for torch
    from gpt2xla.config import ModelConfig
    from gpt2xla.data.tokenizer import Tokenizer
    from gpt2xla.generation.sampling import SamplingConfig
    from gpt2xla.generation.settings import GenerationSettings
    from gpt2xla.model.gpt2 import GPT2
    from gpt2xla.runtime.base import Device


@dataclass(frozen=True)
class GenerateConfig:
    """Generation"""

    model: str = option(MISSING, MODEL_HELP, is_path=True, check=paths.check_model)
    tokenizer: str | None = option(
        None, f"{TOKENIZER_HELP} (default: the model's own)", is_path=True, check=paths.check_tokenizer
    )
    chat: bool = option(
        False, "answer messages in a conversation, as the model's chat template writes it, instead of continuing text"
    )
    system: str = option("", "with --chat: the system message, before every conversation that has none")
    prompt: str | None = option(
        None, "text to continue, or with --chat one message to answer (default: ask for them until end of input)"
    )
    draw: str | None = option(
        None,
        "draw this word in the terminal, with a model that was trained on sketches; --num-samples stand side by side",
    )
    prompts_file: str | None = option(
        None,
        "file of prompts to continue, one a line; with --chat of conversations, one JSON list of {role, content} a line; "
        "writes JSON lines",
        is_path=True,
    )
    output: str | None = option(
        None, "with --prompts-file: file for the JSON lines (default: standard output)", is_path=True
    )
    batch_size: int = option(8, "with --prompts-file: prompts computed side by side, each with its --num-samples")
    num_samples: int = option(1, "continuations of each prompt, or drawings; number j, from 0, draws with --seed + j")
    seed: int | None = option(
        None,
        "repeat the texts or drawings of this seed (default: a new seed each time, which is printed to standard error)",
    )
    max_new_tokens: int | None = option(
        None, "longest continuation, in tokens (default: 100; with --chat a quarter of the context)"
    )
    temperature: float = option(
        0.8, "below 1 plainer, above 1 wilder, 0 always the likeliest token; 1 is the model itself"
    )
    top_k: int = option(40, "draw from the k likeliest tokens; 0 is off")
    top_p: float = option(1.0, "draw from the likeliest tokens that together reach this probability; 1 is off")
    repetition_penalty: float = option(
        1.0, "make tokens that are in the text, prompt and history included, less likely; 1 is off, 1.2 is usual"
    )
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
        require_at_least(1, self, "max_new_tokens", "num_samples", "batch_size")
        if self.temperature == 0 and self.num_samples > 1:
            raise InputError(
                f"--num-samples {self.num_samples}: all would be the same with --temperature 0; leave one of the two out"
            )
        self._check_chat()
        self._check_draw()
        if self.seed is not None and not 0 <= self.seed < 2**63 - self.num_samples:
            raise InputError(f"--seed {self.seed}: choose a number from 0 to 2^63 - 1 - --num-samples")
        if "" in self.stop:
            raise InputError("--stop is empty; give the text to stop at")
        if self.prompts_file is not None and self.prompt is not None:
            raise InputError("--prompt and --prompts-file exclude each other; leave one out")
        for name, text in (("--prompt", self.prompt or ""), ("--system", self.system)):
            if any("\ud800" <= character <= "\udfff" for character in text):  # Python's form of stray bytes
                raise InputError(f"{name} is not UTF-8; convert it, or set a UTF-8 locale")
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

    def _check_chat(self) -> None:
        if self.system and not self.chat:
            raise InputError("--system goes with --chat; add it, or leave --system out")
        if not self.chat:
            return
        if self.prompt is not None and not self.prompt.strip():
            raise InputError("--prompt is empty; write a message")
        if self.special_tokens_in_text != "as-text":
            raise InputError(
                f"--special-tokens-in-text {self.special_tokens_in_text}: in messages they are always letters; leave it out"
            )
        if self.num_samples > 1 and self.prompt is None and self.prompts_file is None:
            raise InputError(
                f"--num-samples {self.num_samples}: a conversation continues after one answer; leave it out, or add --prompt"
            )

    def _check_draw(self) -> None:
        if self.draw is None:
            return
        others = {
            "--prompt": self.prompt, "--chat": self.chat, "--prompts-file": self.prompts_file, "--stop": self.stop,
            "--max-new-tokens": self.max_new_tokens, "--special-tokens-in-text": self.special_tokens_in_text != "as-text",
        }  # fmt: skip
        if used := [name for name, value in others.items() if value not in (None, False, ())]:
            raise InputError(f"--draw and {used[0]} exclude each other; leave one out")


def main() -> None:
    options = parse_options(GenerateConfig, "Continue text with a GPT-2, chat with it, or let it draw.")
    options.check()
    from gpt2xla.checkpoint.run_folder import refuse_unfinished

    refuse_unfinished(options.model)  # before torch is imported
    from gpt2xla.checkpoint.loading import build_model, load_weights, locate
    from gpt2xla.data.tokenizer import find_tokenizer
    from gpt2xla.data.tokenizer_folder import model_folder
    from gpt2xla.generation.devices import move
    from gpt2xla.generation.sampling import SamplingConfig
    from gpt2xla.generation.settings import GenerationSettings

    sampling = SamplingConfig(options.temperature, options.top_k, options.top_p, options.repetition_penalty)
    sampling.check()
    source = locate(options.model)
    config, weights = load_weights(source)
    tokenizer = find_tokenizer(options.tokenizer, source, config.real_vocab_size)
    folder = model_folder(source)
    settings = GenerationSettings.load(folder) if folder.is_dir() else GenerationSettings.of(tokenizer)
    # All input is checked before the model is built.
    if options.draw is not None:
        work = _drawing(options, options.draw, config, tokenizer, sampling)
    else:
        work = _writing(options, config, tokenizer, settings, sampling)
    for note in weights.notes:
        print(note, file=sys.stderr)
    if unused := settings.unused():
        shown = ", ".join(f"{key} {value}" for key, value in unused.items())
        print(f"note: only flags count here, not the model's generation_config.json: {shown}", file=sys.stderr)
    model = build_model(config, weights, source)
    work(model, move(model, options.device, options.mixed_precision))


def _writing(
    options: GenerateConfig,
    config: ModelConfig,
    tokenizer: Tokenizer,
    settings: GenerationSettings,
    sampling: SamplingConfig,
) -> Callable[[GPT2, Device], None]:
    """Return what writes texts or answers with a model on a device. Raises InputError if a prompt is wrong."""
    from gpt2xla.generation.dialogue import ChatReader, Dialogue
    from gpt2xla.generation.interactive import ask, converse
    from gpt2xla.generation.prompt_file import TextReader, json_lines
    from gpt2xla.generation.writer import Writer

    reader: TextReader | ChatReader
    if options.chat:
        reader = ChatReader.of(tokenizer, config, settings, options.max_new_tokens, options.system, options.model)
    else:
        reader = TextReader(tokenizer, config, settings, options.max_new_tokens, options.special_tokens_in_text)
    many = [] if options.prompts_file is None else reader.entries(Path(options.prompts_file))
    one = None if options.prompt is None else reader.prompt(options.prompt)

    def write(model: GPT2, device: Device) -> None:
        writer = Writer(
            model, device, reader.tokenizer, sampling, reader.stop_ids, options.stop, options.num_samples, options.chat
        )
        seed = options.seed if options.seed is not None else new_seed(options)
        seeds = itertools.count(seed, options.num_samples)  # the same prompt again gives another text
        if many:
            with json_lines(options.output) as write_line:
                writer.write(many, options.batch_size, seed, write_line)
        elif one is not None:
            writer.show(one, seed)
        elif isinstance(reader, ChatReader):
            converse(Dialogue(reader), lambda prompt, show: writer.show(prompt, next(seeds), show))
        else:
            ask(lambda text: writer.show(reader.prompt(text), next(seeds)))

    return write


def _drawing(
    options: GenerateConfig, word: str, config: ModelConfig, tokenizer: Tokenizer, sampling: SamplingConfig
) -> Callable[[GPT2, Device], None]:
    """Return what draws a word with a model on a device, row by row, as many samples side by side as the terminal is wide.
    Raises InputError if the model was not trained on sketches, or no sketch can be of the word."""
    from gpt2xla.generation.block_characters import characters_for, fitting, lines_of
    from gpt2xla.generation.drawing import check_can_draw, draw_rows
    from gpt2xla.sketches.format import SketchFormat

    format = SketchFormat.of_model(options.model, tokenizer)
    format.check_word(word, "--draw")
    check_can_draw(config, format, word)

    def draw(model: GPT2, device: Device) -> None:
        if word not in format.words:
            print(f"note: {word!r} is none of the {len(format.words)} words that the model learned", file=sys.stderr)
        seed = options.seed if options.seed is not None else new_seed(options)
        columns = min(options.num_samples, fitting(format.size, shutil.get_terminal_size().columns))
        for start in range(0, options.num_samples, columns):
            seeds = range(seed + start, seed + min(start + columns, options.num_samples))
            if start:
                print()
            # On XLA a smaller last group would be another program.
            steps = draw_rows(model, format, [word] * len(seeds), sampling, seeds, device=device, rows=columns)
            for line in lines_of(steps, format.size, characters_for(sys.stdout)):
                print(line, flush=True)

    return draw


def new_seed(options: GenerateConfig) -> int:
    """Return a new seed. It is printed, unless it changes nothing."""
    seed = secrets.randbelow(10**9)
    if options.temperature > 0:
        kind = "text" if options.draw is None else "drawing"
        is_one = options.num_samples == 1 and (options.prompt is not None or options.draw is not None)
        texts = f"this {kind}" if is_one else f"these {kind}s"
        print(f"seed {seed}: add --seed {seed} to get {texts} again", file=sys.stderr, flush=True)
    return seed
