#!/usr/bin/env python
"""What is in a folder of token shards: `python scripts/inspect_data.py data/books/train`."""

import argparse
import sys

from gpt2xla.cli import OneLineParser
from gpt2xla.exits import exit_code


def main() -> None:
    parser = OneLineParser(description="Show counts, unigram entropy and the first tokens of a folder of shards.")
    parser.add_argument("folder", help="folder of token shards")
    options: argparse.Namespace = parser.parse_args()
    from gpt2xla.data.shards import TokenStream
    from gpt2xla.evals.unigram import unigram_entropy
    from gpt2xla.tokenizer import has_tokenizer, load_tokenizer

    stream = TokenStream(options.folder, "folder")
    print(f"{stream.length:,} tokens in {len(stream.files)} shards")
    if manifest := stream.manifest:
        print(f"{manifest.documents:,} documents, {manifest.bytes / manifest.tokens:.2f} bytes per token")
        print(f"tokenizer {manifest.tokenizer}, {manifest.vocab_size:,} ids, end of text {manifest.eot_id}")
    print(f"unigram entropy {unigram_entropy(stream):.4f} nats per token: the loss of a model that ignores context")
    first = stream.read(0, min(64, stream.length)).tolist()
    print(f"first tokens: {first}")
    if has_tokenizer(stream.folder):
        print(f"as text: {load_tokenizer(str(stream.folder)).decode(first)!r}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
