"""Run by test_work.py in its own process: texts and answers of the playground on XLA, in another thread as on the page, and
how many programs were compiled until the end of each.

Prints one JSON object. Arguments: a model that chats, and its name on the page.
"""

import json
import queue
import re
import sys

from gpt2xla.playground.chat_tab import Talk, answer
from gpt2xla.playground.models import Models
from gpt2xla.playground.write_tab import write
from gpt2xla.runtime.xla.compiles import count_compiles

SETTINGS = (0, 12, 0, 1, 1, "0", "")


def main(folder: str, name: str) -> None:
    models = Models([folder], None, "xla", "none")
    texts: queue.Queue[tuple[str, int]] = queue.Queue()

    def work() -> None:
        for prompt in ("red", "a longer prompt " * 3, "x", "word " * 15):
            *_, page = write(models, name, prompt, *SETTINGS)
            texts.put((re.sub("<[^>]*>", "", page), count_compiles()))
        for question in ("red", "blue"):
            *_, [_, shown, _, _] = answer(models, name, question, Talk(), "", *SETTINGS)
            texts.put((shown[-1]["content"], count_compiles()))

    models.thread.do(work)
    print(json.dumps([texts.get() for _ in range(6)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
