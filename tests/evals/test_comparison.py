"""Models side by side: figures and paired differences against the single programs' and numpy's, and the picture."""

import json
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import run_here, succeed
from evals.small import (
    MMLU_SUBJECTS,
    make_items,
    make_mmlu,
    make_model,
    make_split,
    reference_log_probabilities,
    reference_losses,
    reference_mmlu,
)

from gpt2xla.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_split(tmp_path_factory.mktemp("documents") / "data")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [make_model(folder / name, seed=seed) for seed, name in enumerate(("base", "tuned"), 1)]


def paired(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    differences = after.astype(float) - before.astype(float)
    return differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences))


def test_two_models_in_one_table_and_one_picture(models: list[Path], split: Path, tmp_path: Path) -> None:
    items = make_items(tmp_path / "items.jsonl", 20)
    data = make_mmlu(tmp_path / "mmlu")
    flags = [
        *models, "--mmlu", "--mmlu-data", data, "--subjects", *MMLU_SUBJECTS, "--hellaswag", "--hellaswag-data",
        tmp_path / "items.jsonl", "--valid-dir", split, "--output", tmp_path / "table", "--plot", tmp_path / "picture.svg",
        "--batch-size", 16,
    ]  # fmt: skip
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        text = succeed(run_here("scripts/compare_models.py", *flags))
    table, written = (tmp_path / "table.md").read_text(), json.loads((tmp_path / "table.json").read_text())
    assert table in text
    figures = written["figures"]

    sums, counts = zip(*(reference_losses(model, split) for model in models), strict=True)
    losses = [s.sum() / c.sum() for s, c in zip(sums, counts, strict=True)]
    loss = figures["Loss (nats per token)"]
    assert [one["value"] for one in loss["models"]] == pytest.approx(losses, rel=1e-6)
    (difference,) = loss["differences"]
    assert difference["value"] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    # Windows of one length but the last: nearly the error of a mean of differences.
    whole = slice(None, -1)
    expected = paired(sums[0][whole] / counts[0][whole], sums[1][whole] / counts[1][whole])[1]
    assert difference["standard_error"] == pytest.approx(expected, rel=0.05)
    bits = figures["Bits per byte"]
    scale = bits["models"][0]["value"] / losses[0]
    assert bits["differences"][0]["standard_error"] == pytest.approx(difference["standard_error"] * scale, rel=1e-6)

    chosen = [reference_log_probabilities(model, items)[0].argmax(1) for model in models]
    right = [one == np.array([int(item["label"]) for item in items]) for one in chosen]
    acc = figures["HellaSwag acc"]
    assert [one["value"] for one in acc["models"]] == [one.mean() for one in right]
    assert list(acc["differences"][0].values()) == pytest.approx(paired(*right))

    answered = [reference_mmlu(model, data, 0)[1] for model in models]
    every = [np.array([r for of in one.values() for r in of]) for one in answered]
    assert [one["value"] for one in figures["MMLU, 0-shot"]["models"]] == pytest.approx([one.mean() for one in every])
    assert list(figures["MMLU, 0-shot"]["differences"][0].values()) == pytest.approx(paired(*every))
    stem = [np.array(one["abstract_algebra"] + one["astronomy"]) for one in answered]
    assert list(figures["MMLU stem"]["differences"][0].values()) == pytest.approx(paired(*stem))

    head, _, *rows = table.split("\n\n")[0].splitlines()
    assert head == f"|  | {models[0]} | {models[1]} | {models[1]} − {models[0]} |"  # noqa: RUF001  a minus sign
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(figures)
    assert re.search(rf"\| {losses[0]:.4f} ± [0-9.]+ \| {losses[1]:.4f} ± [0-9.]+ \| [+-][0-9.]+ ± [0-9.]+ \|", rows[0])
    picture = (tmp_path / "picture.svg").read_text()
    assert all(word in picture for word in ("Accuracy", "Bits per byte", "HellaSwag", "sciences", "tuned"))
    assert "Loss (nats" not in picture


def test_a_tokenizer_with_tokens_added_fits_and_another_has_its_own_split(
    models: list[Path], split: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.backend.add_special_tokens(["<|user|>"])
    (tmp_path / "chat").mkdir()
    tokenizer.save(tmp_path / "chat")
    chat = make_model(tmp_path / "tuned", tokenizer=load_tokenizer(str(tmp_path / "chat")))
    flags = [models[0], chat, "--valid-steps", 2, "--valid-dir"]
    text = succeed(run_here("scripts/compare_models.py", *flags, split))
    assert "| Loss (nats per token) |" in text
    assert "MMLU" not in text
    (tmp_path / "text.txt").write_text("Some words. " * 10_000)
    own, made_with = tmp_path / "own", ["--tokenizer", tmp_path / "chat"]
    succeed(run_here("scripts/prepare_text.py", "--input", tmp_path / "text.txt", "--output-dir", own, *made_with))
    refused = run_here("scripts/compare_models.py", chat, models[0], "--valid-dir", own / "test")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1), "before any model is measured"
    assert f"--model {models[0]}: it has 257 ids, and --valid-dir {own / 'test'} was made with a " in refused.stderr
    two = succeed(run_here("scripts/compare_models.py", *flags, split, split.parent / "train"))
    (loss,) = re.findall(r"\| Loss \(nats per token\) \|.*", two)
    assert loss.endswith("|  |"), "no difference"
    assert "Losses per token do not compare between tokenizers; bits per byte do" in two


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["{a}", "{b}"], "nothing to compare; add --mmlu, --hellaswag or --valid-dir DIR"),
        (["{a}", "--mmlu"], "one model compares with none"),
        (["{a}", "{b}", "--valid-dir", "{s}", "{s}", "{s}"], "--valid-dir names 3 folders for 2 models"),
        (["{a}", "{b}", "--hellaswag", "--shots", "5"], "--shots needs --mmlu"),
        (["{a}", "{b}", "--mmlu", "--shots", "-1"], "--shots -1"),
        (["{a}", "{b}", "--valid-dir", "{s}", "--plot", "x.jpg"], "--plot x.jpg: give a name that ends in .png"),
        (["{a}", "{b}", "--valid-dir", "{s}", "--plot", "{p}"], "p.png: it is a folder; choose another"),
        (["--mmlu"], "add MODEL: it has no default"),
    ],
)
def test_wrong_options_are_one_line(
    flags: list[str], says: str, models: list[Path], split: Path, tmp_path: Path
) -> None:
    (folder := tmp_path / "p.png").mkdir()
    words = [flag.format(a=models[0], b=models[1], s=split, p=folder) for flag in flags]
    result = run_here("scripts/compare_models.py", *words)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert says in result.stderr
