"""Opens a page in the browser for models of a run: `python scripts/playground.py --model checkpoints`."""

from __future__ import annotations

import importlib.util
from dataclasses import MISSING, dataclass
from typing import Literal

from gpt2xla.cli import parse_options
from gpt2xla.config import MODEL_HELP, PRECISION_ALIASES, TOKENIZER_HELP, Precision, option, paths
from gpt2xla.errors import InputError


@dataclass(frozen=True)
class PlaygroundConfig:
    """The page"""

    model: tuple[str, ...] = option(
        MISSING,
        f"{MODEL_HELP}; of a local folder of checkpoints the page offers each. It opens nothing else",
        is_path=True,
        check=paths.check_models,
        other_names=("models", "checkpoints-dir"),
    )
    tokenizer: str | None = option(
        None, f"{TOKENIZER_HELP}, of all models (default: each model's own)", is_path=True, check=paths.check_tokenizer
    )
    device: Literal["auto", "cpu", "cuda", "mps", "xla"] = option("auto", "auto: cuda, else mps, else cpu")
    mixed_precision: Precision = option(
        "auto",
        "type of the weights and of all that is computed from them, as in generate.py",
        aliases=PRECISION_ALIASES,
        other_names=("dtype",),
    )
    host: str = option("127.0.0.1", "address to serve on; 0.0.0.0 shows the page to the whole network")
    port: int = option(7860, "port to serve on; 0 takes a free one")
    open: bool = option(False, "open the page in the browser")

    def check(self) -> None:
        if not 0 <= self.port < 2**16:
            raise InputError(f"--port {self.port}: choose a number from 0 to 65535")
        if "" in self.model:
            raise InputError("--model is empty; give a folder, a .pt file, gpt2 ... gpt2-xl or a hub id")


def main() -> None:
    options = parse_options(PlaygroundConfig, "Open a page in the browser for models: write, chat, draw, look inside.")
    options.check()
    from gpt2xla.checkpoint.run_folder import refuse_unfinished
    from gpt2xla.playground.address import listen

    for name in options.model:
        refuse_unfinished(name)
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the playground needs Gradio; pip install 'gpt2xla[playground]'")
    with listen(options.host, options.port) as address:  # before torch is imported
        from gpt2xla.playground.models import Models

        models = Models(options.model, options.tokenizer, options.device, options.mixed_precision)
        from gpt2xla.playground.server import serve

        serve(models, address, opens_browser=options.open)
