"""Made-up data for instruct tuning, the same at every call: text to pre-train on, instructions in two formats whose answers
follow from the questions, and items of two benchmarks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = "apple bread cloud dance earth flame grass house ivory juice knife lemon money night ocean paper queen river".split()
COLORS = "red blue green white black brown".split()


def base_text(documents: int, seed: int = 0) -> list[str]:
    """Sentences of the words and numbers that the instructions are about."""
    draw = random.Random(seed)
    return [" ".join(_sentence(draw) for _ in range(draw.randint(3, 12))) for _ in range(documents)]


def _sentence(draw: random.Random) -> str:
    one, other = draw.sample(WORDS, 2)
    a, b = draw.randint(1, 20), draw.randint(1, 20)
    return draw.choice([
        f"The {draw.choice(COLORS)} {one} is near the {other}.",
        f"{a} and {b} make {a + b}.",
        f"After the {one} comes the {other}, and then the {one} again.",
        f"There are {a} letters about the {one}.",
    ])  # fmt: skip


def _task(draw: random.Random) -> tuple[str, str, str]:
    """An instruction, what it is about, and the answer."""
    word, other, color = draw.choice(WORDS), draw.choice(WORDS), draw.choice(COLORS)
    a, b = draw.randint(1, 20), draw.randint(1, 20)
    return draw.choice([
        (f"Add {a} and {b}.", "", f"{a} and {b} make {a + b}."),
        ("Repeat the word.", word, word),
        ("Write the word twice.", word, f"{word} {word}"),
        ("Which color is in the sentence?", f"The {color} {word} is near the {other}.", f"The color is {color}."),
        ("Write the words in the order of the alphabet.", f"{word}, {other}", ", ".join(sorted((word, other)))),
    ])  # fmt: skip


def alpaca(records: int, seed: int = 1) -> list[dict[str, Any]]:
    """Records with instruction, input and output. The answer of one is longer than any row of a small trial."""
    draw = random.Random(seed)
    found = [dict(zip(("instruction", "input", "output"), _task(draw), strict=True)) for _ in range(records)]
    found[records // 2]["output"] = "The answer is long. " * 400
    return found


def conversations(records: int, seed: int = 2) -> list[dict[str, Any]]:
    """Records of `messages`, one to three turns each, some after a system message."""
    draw, found = random.Random(seed), []
    for _ in range(records):
        messages = [{"role": "system", "content": "Answer in few words."}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            instruction, about, answer = _task(draw)
            messages.append({"role": "user", "content": f"{instruction}\n{about}".strip()})
            messages.append({"role": "assistant", "content": answer})
        found.append({"messages": messages})
    return found


def hellaswag_items(number: int, seed: int = 3) -> list[dict[str, Any]]:
    """Items in HellaSwag's fields: four sentences, of which one continues the text."""
    draw = random.Random(seed)
    found = []
    for _ in range(number):
        one, *others = draw.sample(WORDS, 5)
        label = draw.randrange(4)
        endings = [f"comes the {one if place == label else other} again." for place, other in enumerate(others)]
        found.append(
            {"activity_label": "Words", "ctx_a": f"After the {one}", "ctx_b": "", "endings": endings, "label": label}
        )
    return found


def mmlu_rows(seed: int = 4) -> list[list[str]]:
    """A question in the columns of MMLU's CSV files: question, four answers, the letter of the right one."""
    draw = random.Random(seed)
    a, b, right = draw.randint(1, 20), draw.randint(1, 20), draw.randrange(4)
    return [[f"What do {a} and {b} make?", *(str(a + b + place - right) for place in range(4)), "ABCD"[right]]]


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    """Write a .jsonl file, and the folder that it is in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
