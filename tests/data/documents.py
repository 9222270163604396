"""Documents to prepare, and the hashes of what comes of them."""

import hashlib
import random
from pathlib import Path

WORDS = "the quick naïve fox 🙂 jumps over 12,345 lazy dogs\t<|endoftext|> 漢字 don't we'll  x\u00a0y \n".split(" ")


def documents(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(1, 200))).strip() or "x" for _ in range(count)]


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
