"""Loss and perplexity of several models on one split: `python scripts/perplexity_table.py --models gpt2 checkpoints
--valid-dir fineweb_10BT/test`. `--plot losses.png` draws checkpoints against their steps.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gpt2xla.cli import parse_options
from gpt2xla.commands.plot_loss import checked_plot
from gpt2xla.config import option, paths
from gpt2xla.errors import InputError, user_error
from gpt2xla.evals.options import (
    MODELS_HELP,
    OUTPUT_HELP,
    VALID_STEPS_HELP,
    EvalConfig,
    TableFiles,
    machine,
    open_runtime,
)
from gpt2xla.files import write_whole

if TYPE_CHECKING:
    from gpt2xla.evals.perplexity_table import Row


_NO_BEST = "none, as losses within documents (--document-mask) and across them do not compare"


@dataclass(frozen=True, kw_only=True)
class TableConfig(EvalConfig):
    """Perplexity table"""

    model: tuple[str, ...] = option(
        MISSING, MODELS_HELP, is_path=True, check=paths.check_models, other_names=("models",)
    )
    valid_dir: str = option(
        MISSING,
        "folder or URL of the token shards to measure on, or one with test/ in it",
        is_path=True,
        check=paths.check_shards,
    )
    valid_steps: int | Literal["all"] = option("all", VALID_STEPS_HELP)
    output: str | None = option(None, OUTPUT_HELP, is_path=True)
    plot: str | None = option(
        None, "also draw the loss of checkpoints against their step into this .png, .svg or .pdf", is_path=True
    )


def main() -> None:
    options = parse_options(TableConfig, "Measure loss and perplexity of several models on one split.")
    train = options.train_config(options.valid_steps)
    tables = TableFiles(options.output)
    picture = checked_plot(options.plot)
    from gpt2xla.data.split_folders import split_folder
    from gpt2xla.evals.perplexity_table import best_of, markdown, measure, run_of, sources_of
    from gpt2xla.runtime.leaving import leaving_together

    valid_dir = split_folder(options.valid_dir, "test", "--valid-dir")
    sources = sources_of(options.model)  # a missing model shows before hours of measuring
    if picture and not any(run for run, _ in map(run_of, sources.values())):
        raise InputError(
            f"--plot {picture}: none of the models is a checkpoint of a run; name some, such as RUN/step-*"
        )
    runtime = open_runtime(options.device, train)
    with leaving_together(runtime):
        about = {"valid_dir": valid_dir} | machine(runtime)
        rows: list[Row] = []
        for row in measure(sources, valid_dir, train, runtime):
            rows.append(row)
            if runtime.is_main:  # after each model: a later one may take hours, and fail
                best = best_of(rows)
                measured = {"best": best and best.model, "models": [row.as_dict() for row in rows]}
                tables.write(markdown(rows), about | measured)
        if runtime.is_main:
            print(markdown(rows))
            best = best_of(rows)
            if len(rows) > 1:
                print(f"best: {best or _NO_BEST}")
            if picture:
                _plot(rows, valid_dir, picture)
            print(*tables.files, *([picture] if picture else []), sep="\n")


def _plot(rows: list[Row], valid_dir: str, picture: Path) -> None:
    from gpt2xla.evals.perplexity_table import best_of, run_of
    from gpt2xla.logs.checkpoint_picture import Point, draw

    points = [Point(row.model, *run_of(row.source), *row.validation[:2]) for row in rows]
    with user_error(f"--plot {picture}"):
        write_whole(picture, draw(points, valid_dir, picture.suffix.lower()[1:], names_best=best_of(rows) is not None))
