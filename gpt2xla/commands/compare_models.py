"""Compares models: `python scripts/compare_models.py base tuned --mmlu --hellaswag --valid-dir my-data --plot compared.png`
writes one table and one picture, each model beside the first.
"""

from dataclasses import MISSING, dataclass
from typing import Literal

from gpt2xla.cli import parse_options
from gpt2xla.commands.plot_loss import checked_plot
from gpt2xla.config import TOKENIZER_HELP, option, paths, require_at_least
from gpt2xla.config.options import flag
from gpt2xla.errors import InputError, user_error
from gpt2xla.evals.options import (
    MMLU_DATA_HELP,
    MODELS_HELP,
    OUTPUT_HELP,
    SHOTS_HELP,
    SUBJECTS_HELP,
    VALID_STEPS_HELP,
    EvalConfig,
    TableFiles,
    machine,
    open_runtime,
)
from gpt2xla.files import write_whole


@dataclass(frozen=True, kw_only=True)
class CompareConfig(EvalConfig):
    """Comparison of models"""

    model: tuple[str, ...] = option(
        MISSING,
        f"{MODELS_HELP}; the first is what the others are compared with",
        is_path=True,
        check=paths.check_models,
        other_names=("models",),
        is_positional=True,
    )
    mmlu: bool = option(False, "measure the accuracy on MMLU")
    hellaswag: bool = option(False, "measure the accuracy on HellaSwag")
    valid_dir: tuple[str, ...] = option(
        (),
        "measure the loss on these token shards; where tokenizers differ, name one folder of the same text for each model",
        is_path=True,
        check=paths.check_all_shards,
    )
    valid_steps: int | Literal["all"] = option("all", VALID_STEPS_HELP)
    shots: int = option(0, SHOTS_HELP)
    subjects: tuple[str, ...] = option((), SUBJECTS_HELP)
    mmlu_data: str | None = option(None, MMLU_DATA_HELP, is_path=True, check=paths.check_file)
    hellaswag_data: str | None = option(
        None,
        "HellaSwag's items as JSON lines (default: the validation set on the hub)",
        is_path=True,
        check=paths.check_file,
    )
    tokenizer: str | None = option(
        None, f"{TOKENIZER_HELP}, of all models (default: each model's own)", is_path=True, check=paths.check_tokenizer
    )
    output: str | None = option(None, OUTPUT_HELP, is_path=True)
    plot: str | None = option(None, "also draw the table into this .png, .svg or .pdf", is_path=True)


def main() -> None:
    options = parse_options(CompareConfig, "Compare models: one table and one picture, each beside the first.")
    train = options.train_config(options.valid_steps)
    require_at_least(0, options, "shots")
    if not (options.mmlu or options.hellaswag or options.valid_dir):
        raise InputError("nothing to compare; add --mmlu, --hellaswag or --valid-dir DIR")
    if len(options.model) < 2:
        raise InputError("one model compares with none; name two or more")
    if len(options.valid_dir) not in (0, 1, len(options.model)):
        given = f"{len(options.valid_dir)} folders for {len(options.model)} models"
        raise InputError(f"--valid-dir names {given}; name one, or one for each model")
    for needed, others in (("mmlu", ("mmlu_data", "shots", "subjects")), ("hellaswag", ("hellaswag_data",))):
        for name in others:
            if getattr(options, name) and not getattr(options, needed):
                raise InputError(f"{flag(name)} needs {flag(needed)}; add it")
    tables = TableFiles(options.output)
    picture = checked_plot(options.plot)
    from gpt2xla.checkpoint.loading import locate
    from gpt2xla.data.split_folders import split_folder
    from gpt2xla.evals import hellaswag, mmlu
    from gpt2xla.evals.comparison import Comparison, Tasks
    from gpt2xla.runtime.leaving import leaving_together

    subjects = mmlu.chosen_subjects(options.subjects)
    tasks = Tasks(
        valid_dirs=[split_folder(folder, "test", "--valid-dir") for folder in options.valid_dir],
        hellaswag=hellaswag.read_items(options.hellaswag_data, "--hellaswag-data") if options.hellaswag else None,
        mmlu=mmlu.read_items(options.mmlu_data, "--mmlu-data", options.shots, subjects) if options.mmlu else None,
        shots=options.shots,
    )
    sources = [locate(model) for model in options.model]
    runtime = open_runtime(options.device, train)
    with leaving_together(runtime):
        comparison = Comparison(options.model, tasks)
        comparison.measure(sources, options.tokenizer, train, runtime)
        if not runtime.is_main:
            return
        print(comparison.markdown())
        tables.write(comparison.markdown(), machine(runtime) | comparison.as_dict())
        if picture:
            from gpt2xla.logs.comparison_picture import draw

            with user_error(f"--plot {picture}"):
                write_whole(picture, draw(options.model, comparison.panels(), picture.suffix.lower()[1:]))
        print(*tables.files, *([picture] if picture else []), sep="\n")
