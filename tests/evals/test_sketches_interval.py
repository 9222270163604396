"""--sketches-interval: recognition and a picture of drawn words during training, which they must leave as it is."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_RUN, metrics, run_here, run_xla, succeed, torchrun, training_losses
from evals.sketch_data import WORDS, format_of, make_data, pictures
from PIL import Image

from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.data.windows import Windows
from gpt2xla.evals.recognition import read_sketches, word_log_probabilities
from gpt2xla.logs.sketch_picture import sketch_picture
from gpt2xla.sketches.format import SketchFormat

LENGTH = 96
SKETCHES = ["--sketches-interval", 3]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    data = make_data(tmp_path_factory.mktemp("sketches") / "data", format_of("pieces"), LENGTH)
    own = ["--train-dir", data / "train", "--valid-dir", data / "test", "--vocab-size", 640, "--seq-length", LENGTH]
    return [*SMALL_RUN, *own, "--train-steps", 8, "--valid-interval", 0, "--save-interval", 6, "--dropout", 0.1]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory, flags: list[object]) -> Path:
    folder = tmp_path_factory.mktemp("without")
    succeed(run_here("run_pretrain.py", *flags, "--checkpoints-dir", folder))
    return folder


def sketch_lines(folder: Path) -> list[dict]:
    return [line for line in metrics(folder) if "sketch_top1" in line]


def check(folder: Path, output: str, *, drawn: bool = True) -> None:
    """At the steps asked for and at the end: a line in the log and on the console, and a picture."""
    lines = sketch_lines(folder)
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert all(line["sketch_drawings"] == 60 and 0 <= line["sketch_top1"] <= line["sketch_top5"] <= 1 for line in lines)
    shown = re.findall(
        r"^step +\d+: sketches: top-1 [\d.]+, top-5 [\d.]+ of 60 held-out drawings(.*)$", output, re.MULTILINE
    )
    names = [f"sketches/step-{step:08d}.png" for step in (3, 6, 8)] if drawn else []
    assert [line["sketches"] for line in lines if "sketches" in line] == names
    assert shown == ([f"; drawn in {name}" for name in names] or [""] * 3)
    assert sorted(str(file.relative_to(folder)) for file in folder.glob("sketches/*")) == names
    for name in names:
        with Image.open(folder / name) as picture:
            assert picture.size == (5 * 132 + 12, 4 * 154 + 12)


def test_training_stays_as_it_is_and_a_resumed_run_logs_the_same(
    flags: list[object], without: Path, tmp_path: Path
) -> None:
    """Dropout of later steps would be other if drawing used training's random numbers. The last figures are those of the
    saved model, by the likelihoods of single pictures."""
    folder, other = tmp_path / "a", tmp_path / "b"
    check(folder, succeed(run_here("run_pretrain.py", *flags, *SKETCHES, "--checkpoints-dir", folder)))
    assert training_losses(folder) == training_losses(without)

    shutil.copytree(without / "step-00000006", other / "step-00000006")
    succeed(run_here("run_pretrain.py", *flags, *SKETCHES, "--checkpoints-dir", other))
    assert sketch_lines(other) == sketch_lines(folder)[2:]
    last = Path("sketches") / "step-00000008.png"
    assert (other / last).read_bytes() == (folder / last).read_bytes()

    source = folder / "step-00000008"
    config, weights = load_weights(source)
    format = SketchFormat.of(load_tokenizer(str(source)))
    assert format is not None
    assert sorted(format.words) == sorted(WORDS), "a checkpoint's tokenizer has them"
    windows = Windows(TokenStream(flags[flags.index("--valid-dir") + 1], "--valid-dir"), LENGTH, 640)
    held_out = read_sketches(windows, format, 1000)
    found = word_log_probabilities(build_model(config, weights, source), format, [picture for picture, _ in held_out])
    ranks = [int((row > row[format.words.index(word)]).sum()) for row, (_, word) in zip(found, held_out, strict=True)]
    line = sketch_lines(folder)[-1]
    assert line["sketch_top1"] == pytest.approx(np.mean([rank < 1 for rank in ranks]), abs=1 / 60)
    assert line["sketch_top5"] == pytest.approx(np.mean([rank < 5 for rank in ranks]), abs=1 / 60)


def test_the_picture_shows_each_drawing_above_its_word() -> None:
    drawn = [picture for picture, _ in pictures(7, 24)]
    png = sketch_picture(drawn, [*WORDS[:6], "a word that is much longer than a drawing is wide"])
    assert len(png) < 10_000
    with Image.open(io.BytesIO(png)) as image:
        shades = np.asarray(image.convert("L"))
    assert shades.shape == (2 * 154 + 12, 5 * 132 + 12)
    for number, picture in enumerate(drawn):
        top, left = 12 + number // 5 * 154, 12 + number % 5 * 132
        assert ((shades[top : top + 120 : 5, left : left + 120 : 5] < 128) == picture).all()
        caption = shades[top + 121 : top + 142, left - 5 : left + 125]
        assert (caption < 150).any(), "letters"
        assert (caption[:, [*range(5), *range(-5, 0)]] > 200).all(), "within the width"


def test_data_without_sketches_are_refused(data_flags: list[str], tmp_path: Path) -> None:
    result = run_here("run_pretrain.py", *data_flags, *SMALL_RUN, *SKETCHES, "--checkpoints-dir", tmp_path / "c")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert (
        "--sketches-interval 3: the data hold no sketches; prepare some with scripts/prepare_sketches.py"
        in result.stderr
    )
    assert not (tmp_path / "c").exists()


def test_a_picture_that_cannot_be_written_is_one_line(flags: list[object], without: Path, tmp_path: Path) -> None:
    shutil.copytree(without / "step-00000006", tmp_path / "step-00000006")
    (tmp_path / "sketches").write_text("a file of that name")
    result = run_here("run_pretrain.py", *flags, *SKETCHES, "--checkpoints-dir", tmp_path)
    succeed(result)
    assert result.stderr.count("step-00000008.png cannot be written (") == 1
    assert [line.get("sketches") for line in sketch_lines(tmp_path)] == [None]


@pytest.mark.slow
def test_two_processes_measure_and_draw_the_same(flags: list[object], without: Path, tmp_path: Path) -> None:
    plain = [*flags, "--dropout", 0, *SKETCHES]
    check(tmp_path / "two", succeed(torchrun(2, *plain, "--checkpoints-dir", tmp_path / "two")))
    succeed(run_here("run_pretrain.py", *plain, "--checkpoints-dir", tmp_path / "one"))
    same_figures(tmp_path / "two", tmp_path / "one")


def same_figures(folder: Path, other: Path) -> None:
    for name in ("sketch_top1", "sketch_top5"):
        found, expected = ([line[name] for line in sketch_lines(one)] for one in (folder, other))
        assert found == pytest.approx(expected, abs=2 / 60), "near ties"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "environment"),
    [([], {}), ([], {"CPU_NUM_DEVICES": "2"}), (["--spmd"], {"CPU_NUM_DEVICES": "2"})],
    ids=["one device", "replicas", "spmd"],
)
def test_on_xla_few_programs_come_with_the_first_sketches_and_none_later(
    flags: list[object], tmp_path: Path, more: list[str], environment: dict[str, str]
) -> None:
    plain = [*flags, "--dropout", 0, *SKETCHES]
    succeed(run_here("run_pretrain.py", *plain, "--checkpoints-dir", tmp_path / "torch"))
    result = run_xla(*plain, *more, "--checkpoints-dir", tmp_path / "xla", **environment)
    check(tmp_path / "xla", succeed(result), drawn=not more)
    assert ("draws nothing with --spmd" in result.stderr) == bool(more)
    assert "warning: XLA compiled again" not in result.stderr
    compiles = [line["compiles"] for line in metrics(tmp_path / "xla") if "loss" in line]
    assert compiles[3] == compiles[-1], "after the first sketches"
    if not environment:
        assert compiles[3] == 1 + 2, "training, recognition, a token"
    assert training_losses(tmp_path / "xla") == pytest.approx(training_losses(tmp_path / "torch"), abs=1e-4)
    same_figures(tmp_path / "xla", tmp_path / "torch")


@pytest.mark.slow
def test_wandb_gets_the_picture(flags: list[object], without: Path, tmp_path: Path) -> None:
    shutil.copytree(without / "step-00000006", tmp_path / "step-00000006")
    result = run_here("run_pretrain.py", *flags, *SKETCHES, "--wandb-logging", "--checkpoints-dir", tmp_path)
    succeed(result)
    assert "wandb failed" not in result.stderr
    (sent,) = tmp_path.glob("wandb/offline-run-*/files/media/images/*.png")
    assert sent.read_bytes() == (tmp_path / "sketches" / "step-00000008.png").read_bytes()
    assert json.loads((tmp_path / "wandb_run.json").read_text())["step"] == 8
