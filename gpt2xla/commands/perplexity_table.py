"""Loss and perplexity of several models on one split: `python scripts/perplexity_table.py --models gpt2 checkpoints
--valid-dir fineweb_10BT/test`.
"""

import json
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from gpt2xla.cli import parse_options
from gpt2xla.config import option, paths
from gpt2xla.errors import InputError, user_error
from gpt2xla.evals.options import EvalConfig, open_runtime
from gpt2xla.files import write_whole


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
    output: str | None = option(
        None,
        "also write the table to this path + .md, and full precision to + .json (default: only print it)",
        is_path=True,
    )


def main() -> None:
    options = parse_options(TableConfig, "Measure loss and perplexity of several models on one split.")
    train = options.train_config(options.valid_steps)
    files = _files(options.output) if options.output is not None else []
    from gpt2xla.data.split_folders import split_folder
    from gpt2xla.evals.perplexity_table import Row, markdown, measure
    from gpt2xla.runtime.leaving import leaving_together
    from gpt2xla.runtime.precision import label

    valid_dir = split_folder(options.valid_dir, "test", "--valid-dir")
    runtime = open_runtime(options.device, train)
    with leaving_together(runtime):
        about = {"valid_dir": valid_dir, "devices": runtime.description, "precision": label(runtime.precision.name)}
        rows: list[Row] = []
        for row in measure(list(options.model), valid_dir, train, runtime):
            rows.append(row)
            if runtime.is_main and files:  # after each model: a later one may take hours, and fail
                with user_error(f"--output {options.output}"):
                    write_whole(files[0], markdown(rows))
                    write_whole(
                        files[1], json.dumps(about | {"models": [row.as_dict() for row in rows]}, indent=2) + "\n"
                    )
        if runtime.is_main:
            print(markdown(rows), *files, sep="\n")


def _files(output: str) -> list[Path]:
    files = [Path(f"{output}{suffix}") for suffix in (".md", ".json")]
    if not Path(output).name or not files[0].parent.is_dir() or any(file.is_dir() for file in files):
        raise InputError(f"--output {output!r}: name files in an existing folder, without .md and .json")
    return files
