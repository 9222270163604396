"""A model's accuracy on HellaSwag: `python scripts/eval_hellaswag.py --model checkpoints`."""

import sys
from dataclasses import MISSING, dataclass

from gpt2xla.cli import parse_options
from gpt2xla.config import MODEL_HELP, TOKENIZER_HELP, option, paths
from gpt2xla.errors import counted
from gpt2xla.evals.options import EvalConfig, open_runtime


@dataclass(frozen=True, kw_only=True)
class HellaSwagConfig(EvalConfig):
    """HellaSwag"""

    model: str = option(MISSING, MODEL_HELP, is_path=True, check=paths.check_model)
    data: str | None = option(
        None,
        "items as JSON lines (default: the validation set on the hub)",
        is_path=True,
        other_names=("hellaswag_data",),
    )
    tokenizer: str | None = option(
        None, f"{TOKENIZER_HELP} (default: the model's own)", is_path=True, check=paths.check_tokenizer
    )


def main() -> None:
    options = parse_options(HellaSwagConfig, "Measure a model's accuracy on HellaSwag.")
    train = options.train_config()
    from gpt2xla.checkpoint.loading import build_model, load_weights, locate
    from gpt2xla.data.tokenizer import find_tokenizer
    from gpt2xla.evals.hellaswag import HellaSwag, encode_items, read_items
    from gpt2xla.runtime.leaving import leaving_together

    runtime = open_runtime(options.device, train)
    with leaving_together(runtime):
        items = read_items(options.data, "--data")
        source = locate(options.model)
        model_config, weights = load_weights(source)
        tokenizer = find_tokenizer(options.tokenizer, source, model_config.real_vocab_size)
        questions = encode_items(items, tokenizer, model_config.seq_length)
        model = build_model(model_config, weights, source)
        hellaswag = HellaSwag(questions, model, runtime, train.eval_batch_size)
        runtime.setup_model(model, hellaswag.tokens)
        result = hellaswag.run()
        if runtime.is_main:
            for note in weights.notes:
                print(note, file=sys.stderr)
            shares = {"acc": result.acc, "acc_norm": result.acc_norm}
            shown = ", ".join(
                f"{name} {share:.4f} ± {result.standard_error(share):.4f}" for name, share in shares.items()
            )
            print(f"{source}: HellaSwag {shown} of {counted(result.items, 'item')}")
