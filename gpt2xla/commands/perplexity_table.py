"""Loss and perplexity of several models on one split: `python scripts/perplexity_table.py --models gpt2 checkpoints
--valid-dir fineweb_10BT/test` writes perplexity.md and perplexity.json.
"""

import json
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from gpt2xla.cli import parse_options
from gpt2xla.config import option, paths
from gpt2xla.errors import InputError, user_error
from gpt2xla.evals.options import EvalConfig, open_runtime


@dataclass(frozen=True, kw_only=True)
class TableConfig(EvalConfig):
    """Perplexity table"""

    model: tuple[str, ...] = option(
        MISSING,
        "checkpoint folders, gpt2 ... gpt2-xl, hub ids, or .safetensors, .pt or llm.c files",
        is_path=True,
        check=paths.check_models,
        other_names=("models",),
    )
    valid_dir: str = option(
        MISSING,
        "folder or URL of the token shards to measure on, or one with test/ in it",
        is_path=True,
        check=paths.check_shards,
    )
    valid_steps: int | Literal["all"] = option(
        "all", "number of batches of --batch-size, or all: each token of the split once"
    )
    output: str = option("perplexity", "path of the table, without its endings .md and .json", is_path=True)


def main() -> None:
    options = parse_options(TableConfig, "Measure loss and perplexity of several models on one split.")
    train = options.train_config(options.valid_steps)
    files = [Path(f"{options.output}{suffix}") for suffix in (".md", ".json")]
    if not Path(options.output).name or not files[0].parent.is_dir() or any(file.is_dir() for file in files):
        raise InputError(f"--output {options.output!r}: name files in an existing folder, without .md and .json")
    from gpt2xla.data.split_folders import split_folder
    from gpt2xla.evals.perplexity_table import markdown, measure
    from gpt2xla.runtime.leaving import leaving_together
    from gpt2xla.runtime.precision import label

    valid_dir = split_folder(options.valid_dir, "test", "--valid-dir")
    runtime = open_runtime(options.device, train)
    with leaving_together(runtime):
        rows = measure(list(options.model), valid_dir, train, runtime)
        if runtime.is_main:
            table = markdown(rows)
            about = {"valid_dir": valid_dir, "devices": runtime.description, "precision": label(runtime.precision.name)}
            with user_error(f"--output {options.output}"):
                files[0].write_text(table, encoding="utf-8")
                files[1].write_text(json.dumps(about | {"models": [row.as_dict() for row in rows]}, indent=2) + "\n")
            print(table, *files, sep="\n")
