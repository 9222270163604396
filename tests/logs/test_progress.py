"""The progress that a long evaluation shows, on a terminal and in a log."""

import io
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import wait_for, write_split

from gpt2xla.config import DataConfig, ModelConfig, RunConfig, TorchConfig, TrainConfig
from gpt2xla.data.opening import open_validation
from gpt2xla.evals import multiple_choice, validation
from gpt2xla.evals.multiple_choice import MultipleChoice, Rows
from gpt2xla.evals.validation import Validator
from gpt2xla.logs import progress
from gpt2xla.logs.progress import Progress
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.torch.runtime import TorchRuntime


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.02)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_REFRESHES", 0.02)


def lines_of(stream: io.StringIO) -> list[str]:
    return [line for line in re.split(r"[\r\n]", stream.getvalue()) if line.strip()]


def test_a_log_gets_lines_with_work_done_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with Progress("validation", 40, shown=True) as shown:
        wait_for(lambda: lines_of(log))
        for _ in range(20):
            time.sleep(0.001)
            shown.advance()
        said = len(lines_of(log))
        wait_for(lambda: len(lines_of(log)) > said + 1)
    first, last = lines_of(log)[0], lines_of(log)[-1]
    assert first == "validation: 0/40 batches after 00:00", "also while the first batch is computed"
    assert re.fullmatch(r"validation: 20/40 batches after 00:0\d, 00:0\d left", last)
    said = len(lines_of(log))
    time.sleep(0.1)
    assert len(lines_of(log)) == said, "nothing after the end"


def test_a_terminal_gets_a_line_that_goes_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("HellaSwag", 3, shown=True) as shown:
        shown.advance()
        wait_for(lambda: "HellaSwag: 1/3 batches after 00:00" in terminal.getvalue())
    assert "\n" not in terminal.getvalue()
    assert terminal.getvalue().split("\r")[-2].strip() == "", "wiped out"


def test_only_the_main_process_shows_it_and_only_if_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress("validation", 3, shown=False):
            time.sleep(0.1)
        monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 30)
        monkeypatch.setattr(progress, "_SECONDS_BETWEEN_REFRESHES", 30)
        with Progress("validation", 3, shown=True), pytest.raises(RuntimeError), Progress("other", None, shown=True):
            raise RuntimeError
        assert stream.getvalue() == ""


def test_a_compile_shows_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with Progress("compiling the training step", None, shown=True):
        wait_for(lambda: lines_of(log))
    assert lines_of(log)[0] == "compiling the training step: 00:00 so far"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Progress]]:
    made: list[Progress] = []

    class Recorded(Progress):
        def __enter__(self) -> Progress:
            made.append(self)
            return super().__enter__()

    for module in (validation, multiple_choice):
        monkeypatch.setattr(module, "Progress", Recorded)
    return made


@pytest.mark.parametrize(("steps", "batches"), [("all", 7), (2, 2), (100, 7)])
def test_validation_ends_at_its_total(steps: int, batches: int, counted: list[Progress], tmp_path: Path) -> None:
    """13 windows of 16 tokens and a shorter one, in batches of 2; a number of steps leaves the shorter one out."""
    write_split(tmp_path / "test", np.arange(13 * 16 + 5) % 97)
    model_config = ModelConfig(vocab_size=97, seq_length=16, d_model=32, num_layers=1, num_heads=2)
    train = TrainConfig(eval_batch_size=2, valid_steps=steps, compile=False)  # type: ignore[arg-type]
    config = RunConfig(data=DataConfig(valid_dir=str(tmp_path / "test")), model=model_config, train=train)
    runtime, model = TorchRuntime(TorchConfig(), train), GPT2(model_config)
    runtime.setup_model(model)
    Validator(config, open_validation(config), model, runtime).run()
    assert [(shown._done, shown._batches) for shown in counted] == [(batches, batches)]


def test_multiple_choice_ends_at_its_total(counted: list[Progress]) -> None:
    """Rows have two lengths, and the shorter come in larger batches: 28 in sixes, 12 in threes."""
    model_config = ModelConfig(vocab_size=97, seq_length=256, d_model=32, num_layers=1, num_heads=2)
    lengths = [100] * 28 + [200] * 12
    rows = Rows([np.ones(n, dtype=np.uint16) for n in lengths], [3] * 40, answers=4, seq_length=256)
    runtime, model = TorchRuntime(TorchConfig(), TrainConfig(compile=False)), GPT2(model_config)
    runtime.setup_model(model)
    MultipleChoice("HellaSwag", rows, model, runtime, batch_size=3).run()
    assert [(shown._done, shown._batches) for shown in counted] == [(5 + 4, 9)]
