"""Names drawings: `python scripts/recognise.py apple.png --model checkpoints` shows each as the model sees it, and the
likeliest words."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Literal

from gpt2xla.cli import parse_options
from gpt2xla.config import MODEL_HELP, PRECISION_ALIASES, TOKENIZER_HELP, Precision, option, paths, require_at_least
from gpt2xla.errors import InputError

if TYPE_CHECKING:  # --help does not wait for torch
    from gpt2xla.evals.recognition import Guess
    from gpt2xla.sketches.format import SketchFormat

_BAR = 30  # characters of a probability of 1
_BLOCKS = " ▏▎▍▌▋▊▉█"  # eighths of a character


def _check_files(flag: str, names: Sequence[str]) -> None:
    for name in names:
        if name != "-":
            paths.check_file("FILE", name)
    if names.count("-") > 1:
        raise InputError("FILE - is there twice, and standard input holds one drawing; leave one out")


@dataclass(frozen=True, kw_only=True)
class RecogniseConfig:
    """Recognition of drawings"""

    file: tuple[str, ...] = option(
        MISSING,
        "images (PNG, JPEG, WebP, GIF or BMP) or texts of 0 and 1, one drawing each; - is standard input",
        is_path=True,
        check=_check_files,
        other_names=("files", "input"),
        is_positional=True,
    )
    model: str = option(MISSING, f"{MODEL_HELP}; it must be trained on sketches", is_path=True, check=paths.check_model)
    tokenizer: str | None = option(
        None, f"{TOKENIZER_HELP} (default: the model's own)", is_path=True, check=paths.check_tokenizer
    )
    top: int = option(5, "words to name for each drawing")
    words: tuple[str, ...] = option((), "choose among these words only (default: all that the model learned)")
    json: bool = option(False, "print one JSON object a line for each drawing: its file, words and probabilities")
    device: Literal["auto", "cpu", "cuda", "mps", "xla"] = option("auto", "auto: cuda, else mps, else cpu")
    mixed_precision: Precision = option(
        "auto",
        "type of the weights and of all that is computed from them; none: fp32; auto: as in generate.py",
        aliases=PRECISION_ALIASES,
        other_names=("dtype",),
    )


def main() -> None:
    options = parse_options(RecogniseConfig, "Name drawings with a GPT-2 that was trained on sketches.")
    require_at_least(1, options, "top")
    from gpt2xla.checkpoint.run_folder import refuse_unfinished

    refuse_unfinished(options.model)  # before torch is imported
    from gpt2xla.checkpoint.loading import build_model, load_weights, locate
    from gpt2xla.data.tokenizer import find_tokenizer
    from gpt2xla.evals.recognition import likeliest
    from gpt2xla.generation.block_characters import characters_for, lines_of
    from gpt2xla.generation.devices import move
    from gpt2xla.sketches.format import SketchFormat
    from gpt2xla.sketches.picture_file import read_picture

    source = locate(options.model)
    config, weights = load_weights(source)
    tokenizer = find_tokenizer(options.tokenizer, source, config.real_vocab_size)
    known = SketchFormat.of_model(options.model, tokenizer)
    sketches = SketchFormat(tokenizer, known.size, chosen(options.words, known)) if options.words else known
    # All drawings are checked before the model is built.
    pictures = [read_picture(file, known.size, known.stroke_width) for file in options.file]
    for note in weights.notes:
        print(note, file=sys.stderr)
    model = build_model(config, weights, source)
    device = move(model, options.device, options.mixed_precision)
    characters = characters_for(sys.stdout)
    for number, (file, picture) in enumerate(zip(options.file, pictures, strict=True)):
        guesses = likeliest(model, sketches, picture, options.top, device=device)
        if options.json:
            words = [{"word": guess.word, "probability": guess.probability} for guess in guesses]
            print(json.dumps({"file": file, "words": words}, ensure_ascii=False), flush=True)
            continue
        if len(pictures) > 1:
            print(f"{'' if number == 0 else chr(10)}{file}")
        print(
            *lines_of([[picture]], known.size, characters), *bars(guesses, characters[3] == "█"), sep="\n", flush=True
        )


def chosen(words: Sequence[str], known: SketchFormat) -> list[str]:
    """Return each of the --words once. Raises InputError if the model has not learned one, or there is no choice."""
    for word in words:
        if word not in known.words:
            close = difflib.get_close_matches(word, known.words, n=1)
            fix = f"did you mean {close[0]!r}?" if close else "name some that it learned"
            raise InputError(f"--words {word!r}: the model has not learned this word; {fix}")
    found = list(dict.fromkeys(words))
    if len(found) == 1:
        raise InputError(f"--words {found[0]!r} leaves no choice; name two words or more")
    return found


def bars(guesses: Sequence[Guess], has_blocks: bool) -> list[str]:
    """Return a line for each guess: the word, its probability and a bar as long as that is large."""
    width = max(len(guess.word) for guess in guesses)
    return [
        f"{guess.word:<{width}} {guess.probability:6.1%} {_bar(guess.probability, has_blocks)}".rstrip()
        for guess in guesses
    ]


def _bar(share: float, has_blocks: bool) -> str:
    if not has_blocks:
        return "#" * round(share * _BAR)
    whole, rest = divmod(round(share * _BAR * 8), 8)
    return _BLOCKS[8] * whole + _BLOCKS[rest]
