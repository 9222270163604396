"""Converts a GPT-2 to a Hugging Face folder: `python scripts/convert_checkpoint.py --model ckpt.pt --output-dir my-gpt2`."""

from dataclasses import MISSING, dataclass
from pathlib import Path

from gpt2xla.cli import parse_options
from gpt2xla.config import TOKENIZER_HELP, option, paths


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Conversion"""

    model: str = option(
        MISSING,
        "nanoGPT's ckpt.pt or another .pt, .safetensors or llm.c file, a checkpoint folder, the URL of one of these, "
        "gpt2 ... gpt2-xl or a hub id",
        is_path=True,
        check=paths.check_model,
        other_names=("input",),
    )
    output_dir: str = option(
        MISSING, "folder to make, which Hugging Face can load", is_path=True, check=paths.check_local
    )
    tokenizer: str | None = option(
        None, f"{TOKENIZER_HELP} (default: the model's own, if it has one)", is_path=True, check=paths.check_tokenizer
    )


def main() -> None:
    options = parse_options(ConvertConfig, "Write a GPT-2 checkpoint as a Hugging Face folder.")
    from gpt2xla.checkpoint.convert import convert

    convert(options.model, Path(options.output_dir), options.tokenizer)
