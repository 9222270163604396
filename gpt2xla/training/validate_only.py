"""--do-test: the loss of a checkpoint on the validation split, without training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gpt2xla.checkpoint.run_folder import refuse_unfinished
from gpt2xla.checkpoint.seal import COMPLETE, step_of
from gpt2xla.checkpoint.start import Start
from gpt2xla.config import RunConfig
from gpt2xla.data.opening import end_of_text_of, open_validation, tokenizer_of, with_document_mask
from gpt2xla.errors import InputError, as_named
from gpt2xla.evals.schedule import explain_evaluation
from gpt2xla.evals.validation import Validation, Validator
from gpt2xla.logs.sinks import TEST_FILE, JsonlSink, Sink, perplexity
from gpt2xla.logs.wandb_sink import WandbSink
from gpt2xla.runtime.base import Runtime


def validate(start: Start, runtime: Runtime) -> None:
    """Print loss and perplexity of the checkpoint on the validation split.

    test.jsonl in --checkpoints-dir, if that is given, else in the folder of the run that saved the checkpoint, gets a line.
    The log of a run stays as it is. Raises InputError if there is no checkpoint, or it does not fit the split."""
    if start.source is None:
        refuse_unfinished(start.config.general.checkpoints_dir)
        raise InputError("--do-test: there is no checkpoint to test; name one with --from-checkpoint")
    windows = open_validation(start.config)
    config = with_document_mask(start.config, [windows])
    tokenizer = tokenizer_of(config, [start.source], [windows])  # refuses another tokenizer than the model's
    model = start.build_model()
    model.end_of_text = end_of_text_of(config, tokenizer, [windows])
    with explain_evaluation(runtime, config.train, "validation"):
        validator = Validator(config, windows, model, runtime)
        runtime.setup_model(model, validator.tokens)
        result = validator.run()
    if runtime.is_main:
        for note in windows.stream.notes:
            print(note)
        within = " within documents" if model.end_of_text is not None else ""
        print(
            f"{as_named(start.source)}: {result}{within}; {windows.stream.name} has {windows.stream.length - 1:,} to predict"
        )
        _log_test(config, start.source, result)


def _log_test(config: RunConfig, source: Path, result: Validation) -> None:
    line = {"step": step_of(source), "checkpoint": as_named(source), "valid_dir": config.data.valid_dir}
    line |= result.line() | {"valid_perplexity": perplexity(result.loss), "time": time.time()}
    if folder := _folder_of_tests(config, source):
        _append(folder, line, is_given="checkpoints_dir" in config.given)
    if config.wandb.wandb_logging:
        _write(WandbSink(config, config.general.folder, None), line)


def _folder_of_tests(config: RunConfig, source: Path) -> Path | None:
    """Return --checkpoints-dir if it was given, else the folder of the run that saved `source`; None for other models, and
    for copies of those behind URLs."""
    if "checkpoints_dir" in config.given:
        return config.general.folder
    is_copy = as_named(source) != str(source)
    return source.parent if (source / COMPLETE).is_file() and not is_copy else None


def _append(folder: Path, line: dict[str, Any], *, is_given: bool) -> None:
    file = folder / TEST_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(JsonlSink(file), line)
    except OSError as error:
        if is_given:
            raise InputError(f"--checkpoints-dir {folder}: {error.strerror or error}; choose another") from None
        print(f"not added to {file} ({error.strerror or error}); name another folder with --checkpoints-dir")
    else:
        print(f"added to {file}")


def _write(sink: Sink, line: dict[str, Any]) -> None:
    sink.write(line)
    sink.close()
