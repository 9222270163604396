"""`generate.py` at the terminal: prompts, or the messages of a conversation, are asked for until end of input."""

from __future__ import annotations

import sys
from collections.abc import Callable

from gpt2xla.errors import InputError
from gpt2xla.generation.continuation import Prompt
from gpt2xla.generation.dialogue import Dialogue

RESET = "/reset"


def ask(respond: Callable[[str], None]) -> None:
    """Read lines until end of input. Ctrl-C stops the response or the line, and the next one is asked for."""
    while True:
        try:
            line = input(">> ")
            line.encode()  # some locales let stray bytes through
            if line.strip():
                respond(line)
        except InputError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except UnicodeError:
            print("that line is not UTF-8", file=sys.stderr)
        except EOFError:
            print()
            return


def converse(dialogue: Dialogue, answer: Callable[[Prompt, Callable[[str], None]], None]) -> None:
    """Answer messages until end of input, as `ask` does. An answer that Ctrl-C stops stays in the conversation as far as it
    was shown.

    Args:
        answer: prints the answer to a prompt, and gives the pieces of its text to its second argument."""

    def respond(line: str) -> None:
        if line.strip() == RESET:
            dialogue.reset()
            print("the conversation begins again", file=sys.stderr)
            return
        pieces: list[str] = []
        window = dialogue.asked(line)
        try:
            if window.note:
                print(window.note, file=sys.stderr)
            answer(window.prompt, pieces.append)
        finally:
            dialogue.answered("".join(pieces))

    print(f"{RESET} begins the conversation again, Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    ask(respond)
