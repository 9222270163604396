"""Drawings -> rows of tokens to draw and recognise by: `python scripts/prepare_sketches.py --input full/raw/*.ndjson`."""

from gpt2xla.cli import parse_options
from gpt2xla.sketches.options import SketchesConfig


def main() -> None:
    options = parse_options(SketchesConfig, "Make small pictures of drawings, and of these tokens in train/ and test/.")
    from gpt2xla.sketches.preparation import prepare

    prepare(options)
