"""Conversations -> rows of tokens to train on the answers: `python scripts/prepare_chat.py --input chats.jsonl`."""

from gpt2xla.chat.options import ChatConfig
from gpt2xla.cli import parse_options


def main() -> None:
    options = parse_options(
        ChatConfig, "Tokenise conversations into train/ and test/ rows, with a mask of the answers."
    )
    from gpt2xla.chat.preparation import prepare

    prepare(options)
