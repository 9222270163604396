"""--do-test: the loss of a checkpoint on the validation split, without training."""

from __future__ import annotations

import time
from pathlib import Path

from gpt2xla.checkpoint.folder import step_of
from gpt2xla.checkpoint.start import Start
from gpt2xla.config import RunConfig
from gpt2xla.data.opening import open_validation, tokenizer_of
from gpt2xla.errors import InputError, user_error
from gpt2xla.evals.schedule import explain_evaluation
from gpt2xla.evals.validation import Validation, Validator
from gpt2xla.logs.sinks import TEST_FILE, JsonlSink, Sink, perplexity
from gpt2xla.logs.wandb_sink import WandbSink
from gpt2xla.runtime.base import Runtime


def validate(start: Start, runtime: Runtime) -> None:
    """Print loss and perplexity of the checkpoint on the validation split.

    If --checkpoints-dir was given or exists, its test.jsonl gets a line; the log of a run stays as it is."""
    if start.source is None:
        raise InputError("--do-test: there is no checkpoint to test; name one with --from-checkpoint")
    config = start.config
    windows = open_validation(config)
    tokenizer_of(config, [start.source], [windows])  # refuses another tokenizer than the model's
    model = start.build_model()
    with explain_evaluation(runtime, config.train, "validation"):
        validator = Validator(config, windows, model, runtime)
        runtime.setup_model(model, validator.tokens)
        result = validator.run()
    if runtime.is_main:
        for note in windows.stream.notes:
            print(note)
        print(f"{start.source}: {result}; the split has {windows.stream.length - 1:,} to predict")
        _log_test(config, start.source, result)


def _log_test(config: RunConfig, source: Path, result: Validation) -> None:
    folder = Path(config.general.checkpoints_dir)
    line = {"step": step_of(source), "checkpoint": str(source), "valid_dir": config.data.valid_dir}
    line |= result.line() | {"valid_perplexity": perplexity(result.loss), "time": time.time()}
    sinks: list[Sink] = []
    if "checkpoints_dir" in config.given or folder.is_dir():
        with user_error(f"--checkpoints-dir {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            sinks.append(JsonlSink(folder / TEST_FILE))
    if config.wandb.wandb_logging:
        sinks.append(WandbSink(config, folder, None))
    for sink in sinks:
        sink.write(line)
        sink.close()
