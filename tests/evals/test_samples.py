"""--sample-interval: texts written during training, which they must leave as it is."""

import re
from pathlib import Path

import pytest
from conftest import SMALL_RUN, metrics, prepare_documents, run, run_here, run_xla, succeed, torchrun, training_losses

FLAGS = [*SMALL_RUN, "--vocab-size", 320, "--tokenizer", "bytes", "--train-steps", 8, "--valid-interval", 3]
SAMPLES = ["--sample-interval", 3, "--sample-prompt", "docu"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = prepare_documents(tmp_path_factory.mktemp("documents") / "data")
    return ["--train-dir", folder / "train", "--valid-dir", folder / "test", *FLAGS]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory, documents: list[object]) -> Path:
    folder = tmp_path_factory.mktemp("without")
    succeed(run_here("run_pretrain.py", *documents, "--checkpoints-dir", folder))
    return folder


def samples(folder: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["sample"]) for line in metrics(folder) if "sample" in line]


def check(folder: Path, output: str) -> None:
    """The prompt is continued at the steps asked for and at the end, in the log and on the console once."""
    assert [step for step, _ in samples(folder)] == [3, 6, 8]
    assert all(text.startswith("docu") and len(text) > 4 for _, text in samples(folder))
    assert len(re.findall(r"^step +\d+: sample: docu", output, re.MULTILINE)) == 3


def test_samples_are_shown_and_training_stays_as_it_is(documents: list[object], without: Path, tmp_path: Path) -> None:
    """Dropout of the steps after a sample would be other if it had drawn from training's random numbers."""
    flags = [*documents, "--dropout", 0.1]
    succeed(run_here("run_pretrain.py", *flags, "--checkpoints-dir", tmp_path / "a"))
    output = succeed(run_here("run_pretrain.py", *flags, *SAMPLES, "--checkpoints-dir", tmp_path / "b"))
    check(tmp_path / "b", output)
    assert training_losses(tmp_path / "b") == training_losses(tmp_path / "a")


@pytest.mark.slow
def test_two_processes_show_one_sample(documents: list[object], without: Path, tmp_path: Path) -> None:
    output = succeed(torchrun(2, *documents, *SAMPLES, "--checkpoints-dir", tmp_path))
    check(tmp_path, output)
    assert training_losses(tmp_path) == pytest.approx(training_losses(without), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "environment"),
    [([], {}), ([], {"CPU_NUM_DEVICES": "2"}), (["--mixed-precision", "bf16"], {})],
    ids=["one device", "replicas", "bf16"],
)
def test_on_xla_two_programs_come_with_the_first_sample_and_none_later(
    documents: list[object], without: Path, tmp_path: Path, flags: list[str], environment: dict[str, str]
) -> None:
    result = run_xla(*documents, *SAMPLES, *flags, "--checkpoints-dir", tmp_path, **environment)
    check(tmp_path, succeed(result))
    assert "warning: XLA compiled again" not in result.stderr
    compiles = [line["compiles"] for line in metrics(tmp_path) if "loss" in line]
    assert compiles[3] == compiles[-1], "after the first sample"
    if not environment:
        assert compiles[3] == 2 + 2, "training, validation, the prompt, a token"
    if "bf16" not in flags:
        assert training_losses(tmp_path) == pytest.approx(training_losses(without), abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--sample-interval", -1], "--sample-interval -1"),
        (["--sample-interval", 2, "--sample-prompt", "much too long a prompt"], "--sample-prompt"),
    ],
)
def test_wrong_options_are_one_line_at_the_start(
    documents: list[object], tmp_path: Path, flags: list[object], culprit: str
) -> None:
    result = run("run_pretrain.py", *documents, *flags, "--checkpoints-dir", tmp_path)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert culprit in result.stderr


@pytest.mark.slow
def test_spmd_is_refused(documents: list[object], tmp_path: Path) -> None:
    result = run_xla(*documents, *SAMPLES, "--spmd", "--checkpoints-dir", tmp_path, CPU_NUM_DEVICES="2")
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert errors == ["run_pretrain_xla.py: error: --sample-interval does not work with --spmd; leave one of them out"]


def test_without_a_tokenizer_samples_are_refused(data_flags: list[str], tmp_path: Path) -> None:
    result = run("run_pretrain.py", *data_flags, *SMALL_RUN, *SAMPLES, "--checkpoints-dir", tmp_path)
    assert result.returncode == 2
    assert "--sample-interval" in result.stderr
    assert "--tokenizer" in result.stderr
