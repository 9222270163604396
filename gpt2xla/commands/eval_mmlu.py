"""A model's accuracy on MMLU: `python scripts/eval_mmlu.py --model checkpoints --shots 5`."""

from dataclasses import dataclass

from gpt2xla.cli import parse_options
from gpt2xla.config import option, paths, require_at_least
from gpt2xla.errors import as_named
from gpt2xla.evals.options import (
    MMLU_DATA_HELP,
    OUTPUT_HELP,
    SHOTS_HELP,
    SUBJECTS_HELP,
    OneModelConfig,
    TableFiles,
    machine,
    open_runtime,
)


@dataclass(frozen=True, kw_only=True)
class MmluConfig(OneModelConfig):
    """MMLU"""

    shots: int = option(0, SHOTS_HELP)
    subjects: tuple[str, ...] = option((), SUBJECTS_HELP)
    data: str | None = option(None, MMLU_DATA_HELP, is_path=True, check=paths.check_file, other_names=("mmlu_data",))
    output: str | None = option(None, OUTPUT_HELP, is_path=True)


def main() -> None:
    options = parse_options(MmluConfig, "Measure a model's accuracy on MMLU.")
    train = options.train_config()
    require_at_least(0, options, "shots")
    tables = TableFiles(options.output)
    from gpt2xla.checkpoint.loading import locate
    from gpt2xla.evals.mmlu import chosen_subjects, markdown, questions, read_items, result
    from gpt2xla.evals.multiple_choice import ask
    from gpt2xla.runtime.leaving import leaving_together

    subjects = chosen_subjects(options.subjects)
    runtime = open_runtime(options.device, train)
    with leaving_together(runtime):
        items = read_items(options.data, "--data", options.shots, subjects)
        source = locate(options.model)
        sets = {"MMLU": questions(items)}
        (log_probabilities,) = ask(sets, source, options.tokenizer, runtime, train.eval_batch_size)
        if runtime.is_main:
            found = result(items, log_probabilities)
            print(f"{as_named(source)}: MMLU, {options.shots}-shot, {found}\n\n{markdown(found)}")
            about = {"model": options.model, "shots": options.shots, "data": options.data}
            tables.write(markdown(found), about | machine(runtime) | found.as_dict())
            print(*tables.files, sep="\n")
