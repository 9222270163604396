"""A model's accuracy on HellaSwag: `python scripts/eval_hellaswag.py --model checkpoints`."""

from dataclasses import dataclass

from gpt2xla.cli import parse_options
from gpt2xla.config import option
from gpt2xla.errors import as_named
from gpt2xla.evals.options import OneModelConfig, open_runtime


@dataclass(frozen=True, kw_only=True)
class HellaSwagConfig(OneModelConfig):
    """HellaSwag"""

    data: str | None = option(
        None,
        "items as JSON lines (default: the validation set on the hub)",
        is_path=True,
        other_names=("hellaswag_data",),
    )


def main() -> None:
    options = parse_options(HellaSwagConfig, "Measure a model's accuracy on HellaSwag.")
    train = options.train_config()
    from gpt2xla.checkpoint.loading import locate
    from gpt2xla.evals.hellaswag import accuracy, questions, read_items
    from gpt2xla.evals.multiple_choice import ask
    from gpt2xla.runtime.leaving import leaving_together

    runtime = open_runtime(options.device, train)
    with leaving_together(runtime):
        items = read_items(options.data, "--data")
        source = locate(options.model)
        sets = {"HellaSwag": questions(items)}
        (log_probabilities,) = ask(sets, source, options.tokenizer, runtime, train.eval_batch_size)
        if runtime.is_main:
            print(f"{as_named(source)}: {accuracy(items, log_probabilities)}")
