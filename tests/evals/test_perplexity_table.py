"""The table of models, against Hugging Face's model in float64."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_here, succeed
from evals.small import make_model, make_split, reference_losses
from transformers import GPT2LMHeadModel

from gpt2xla.checkpoint.formats.hugging_face import save_model
from gpt2xla.config import ModelConfig, TorchConfig, TrainConfig
from gpt2xla.evals.perplexity_table import measure
from gpt2xla.generation.settings import GenerationSettings
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
    (row,) = measure([str(tmp_path)], str(make_split(tmp_path / "data")), TrainConfig(), runtime)
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
