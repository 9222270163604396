"""The table of models, against Hugging Face's model in float64."""

import html
import json
import math
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import run_here, succeed
from evals.small import make_model, make_split, reference_losses
from matplotlib.figure import Figure
from transformers import GPT2LMHeadModel

from gpt2xla.checkpoint.formats.hugging_face import save_model
from gpt2xla.checkpoint.seal import seal
from gpt2xla.config import ModelConfig, TorchConfig, TrainConfig
from gpt2xla.evals.perplexity_table import measure, run_of, sources_of
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.logs.checkpoint_picture import Point, draw
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.torch.runtime import TorchRuntime


def test_a_table_of_two_models_in_markdown_and_json(tmp_path: Path) -> None:
    """Models of different lengths, each measured in its own windows."""
    split = make_split(tmp_path / "data")
    models = [make_model(tmp_path / "a", 192, seed=1), make_model(tmp_path / "b", 64, seed=2)]
    flags = ["--models", *models, "--valid-dir", split, "--batch-size", 5, "--output", tmp_path / "table"]
    text = succeed(run_here("scripts/perplexity_table.py", *flags))
    table = (tmp_path / "table.md").read_text()
    assert table in text
    head, _, *rows = table.splitlines()
    assert head.startswith("| Model | Parameters | Loss | Perplexity | Tokens |")
    written = json.loads((tmp_path / "table.json").read_text())
    assert written["precision"] == "fp32"
    for row, values, model in zip(rows, written["models"], models, strict=True):
        sums, counts = reference_losses(model, split)
        loss = sums.sum() / counts.sum()
        assert values["model"] == str(model)
        assert values["loss"] == pytest.approx(loss, rel=1e-6)
        assert values["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert values["tokens"] == counts.sum()
        assert values["windows"] == len(counts)
        parameters = 257 * 32 + values["seq_length"] * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
        assert values["parameters"] == parameters
        shown = [cell.strip() for cell in row.strip("|").split("|")]
        assert shown[:5] == [str(model), f"{parameters:,}", f"{loss:.4f}", f"{np.exp(loss):.2f}", f"{counts.sum():,}"]
        assert shown[5:] == [f"{values['standard_error']:.4f}", f"{values['bits_per_byte']:.4f}"]


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_that_hugging_face_counts_without_padding(tied: bool, tmp_path: Path) -> None:
    config = ModelConfig(264, 64, 32, 2, 2, tie_weights=tied, vocab_padding=7)
    model = GPT2(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(tmp_path, config, model.state_dict(), GenerationSettings.ending_with(256))
    runtime = TorchRuntime(TorchConfig(), TrainConfig())
    (row,) = measure(sources_of([str(tmp_path)]), str(make_split(tmp_path / "data")), TrainConfig(), runtime)
    assert row.parameters == GPT2LMHeadModel.from_pretrained(tmp_path).num_parameters()


def test_a_model_of_other_tokens_is_refused(tmp_path: Path) -> None:
    split, model = make_split(tmp_path / "data"), make_model(tmp_path / "a")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    flags = ["--models", model, "--valid-dir", split, "--output", tmp_path / "table"]
    result = run_here("scripts/perplexity_table.py", *flags)
    assert result.returncode == 2
    assert f"--model {model}: its tokenizer is not the one that made --valid-dir (bytes)" in result.stderr
    missing = run_here("scripts/perplexity_table.py", *flags, "--models", model, tmp_path / "none")
    assert missing.returncode == 2
    assert f"{tmp_path / 'none'}: no such folder" in missing.stderr
    for output in ("", tmp_path / "none" / "table"):
        refused = run_here("scripts/perplexity_table.py", *flags, "--output", output)
        assert refused.returncode == 2
        assert "name files in an existing folder" in refused.stderr
    assert not list(tmp_path.glob("table*"))


def test_checkpoints_are_drawn_against_their_steps_and_the_best_is_named(tmp_path: Path) -> None:
    split = make_split(tmp_path / "data")
    models = [tmp_path / run / f"step-{step:08d}" for run, step in (("a$b$", 20), ("a$b$", 10), ("c", 10))]
    for seed, folder in enumerate(models, 1):
        folder.parent.mkdir(exist_ok=True)
        seal(make_model(folder, seed=seed), step_of_name(folder))
    other = make_model(tmp_path / "other", seed=9)
    flags = ["--valid-dir", split, "--batch-size", 16, "--valid-steps", 2, "--models"]
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        text = succeed(
            run_here(
                "scripts/perplexity_table.py", *flags, *models, other, "--plot", tmp_path / "losses.svg",
                "--output", tmp_path / "table",
            )
        )  # fmt: skip
    measured = json.loads((tmp_path / "table.json").read_text())
    best = min(measured["models"], key=lambda model: model["loss"])
    shown = f"{best['loss']:.4f} ± {best['standard_error']:.4f}"
    assert measured["best"] == best["model"]
    assert f"best: {best['model']}, loss {shown}\n" in text
    texts = html.unescape("\n".join(re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "losses.svg").read_text())))
    run, step = run_of(Path(best["model"]))
    at = f", step {step}" if run else ""
    assert f"{Path(run or best['model']).name}{at}, {shown}" in texts
    assert [line for line in texts.splitlines() if line.endswith(("/a$b$", "/c", "/other"))]
    refused = run_here("scripts/perplexity_table.py", *flags, other, "--plot", tmp_path / "losses.svg")
    assert "none of the models is a checkpoint of a run" in refused.stderr
    for name in ("losses.jpg", "none/losses.png"):
        assert run_here("scripts/perplexity_table.py", *flags, *models, "--plot", tmp_path / name).returncode == 2
    with pytest.MonkeyPatch.context() as patch:
        for name in ("gpt2xla.logs.checkpoint_picture", "gpt2xla.logs.loss_picture", "matplotlib"):
            patch.setitem(sys.modules, name, None)
        without = run_here("scripts/perplexity_table.py", *flags, *models, "--plot", tmp_path / "losses.png")
    assert "plotting needs matplotlib; pip install 'gpt2xla[plot]'" in without.stderr


def test_a_picture_has_a_curve_for_each_run_with_its_errors_and_a_line_for_other_models() -> None:
    points = [Point("x", "run", step, 4 - step / 10, 0.1) for step in (20, 10)]
    points += [Point("y", "run (abandoned-1)", 20, 3.0, None), Point("gpt2", None, 0, 3.2, 0.2)]
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        save = Figure.savefig
        patch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
        assert draw(points, "split", "png").startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [" gpt2", " run", " run (abandoned-1)"]
    (line, _, (bars,)), _ = axes.containers
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([10, 20], [3.0, 2.0])
    assert [segment[:, 1].round(6).tolist() for segment in bars.get_segments()] == [[2.9, 3.1], [1.9, 2.1]]
    assert axes.get_title(loc="left") == "Loss on split\nbest: run, step 20, 2.0000 ± 0.1000"
    for name, expected in (("run/step-00000010", ("run", 10)), ("run/latest", (None, 0))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gpt2xla.evals.perplexity_table.step_of", lambda source: 10)
            assert run_of(Path(name)) == expected


def step_of_name(folder: Path) -> int:
    return int(folder.name[5:])
