"""HellaSwag's scores against a plain loop over Hugging Face's model in float64, on any devices."""

import io
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import metrics, run, run_here, run_xla, succeed, torchrun
from data.hub_server import Hub
from evals.small import MODEL_FLAGS, make_items, make_model, make_split, reference_log_probabilities

from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.config import TorchConfig, TrainConfig
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.errors import InputError
from gpt2xla.evals.hellaswag import accuracy, clean, questions, read_items
from gpt2xla.evals.multiple_choice import MultipleChoice, bucket_lengths, encode
from gpt2xla.runtime.torch.runtime import TorchRuntime

ITEMS = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("items") / "hellaswag.jsonl"
    make_items(file, ITEMS)
    return file


def items_of(items: Path) -> list[dict]:
    return [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def expected(model: Path, items: Path) -> tuple[np.ndarray, float, float]:
    return reference_log_probabilities(model, items_of(items))


def shown(output: str) -> tuple[float, float]:
    found = re.search(rf"HellaSwag acc ([0-9.]+) ± [0-9.]+, acc_norm ([0-9.]+) ± [0-9.]+ of {ITEMS} items", output)
    assert found, output
    return float(found[1]), float(found[2])


def test_log_probabilities_and_accuracies_equal_a_plain_loop(
    model: Path, items: Path, expected: tuple[np.ndarray, float, float]
) -> None:
    """Items of all buckets, some with contexts beyond the model's length, in batches that do not divide them."""
    asked = read_items(str(items), "--data")
    rows = encode("HellaSwag", questions(asked), load_tokenizer(str(model)), 192)
    lengths = {len(tokens) - 1 for tokens in rows.tokens}
    assert min(lengths) < 128 < max(lengths) == 192
    config, weights = load_weights(model)
    ours, train = build_model(config, weights, model), TrainConfig(eval_batch_size=7, compile=False)
    runtime = TorchRuntime(TorchConfig(), train)
    runtime.setup_model(ours)
    found = MultipleChoice("HellaSwag", rows, ours, runtime, 7).run()
    np.testing.assert_allclose(found, expected[0], rtol=1e-5, atol=1e-4)
    result = accuracy(asked, found)
    assert (result.acc, result.acc_norm, len(result.right)) == (*expected[1:], ITEMS)
    assert result.acc != result.acc_norm, "or one of them could be taken for the other"
    assert ours.training, "training continues after it"


def test_one_and_two_processes_are_equal(model: Path, items: Path, expected: tuple[np.ndarray, float, float]) -> None:
    flags = ["--model", model, "--data", items, "--batch-size", 15]
    for result in (
        run_here("scripts/eval_hellaswag.py", *flags),
        torchrun(2, *flags, program="scripts/eval_hellaswag.py"),
    ):
        assert shown(succeed(result)) == expected[1:]


@pytest.mark.slow
def test_on_four_xla_devices_too(model: Path, items: Path, expected: tuple[np.ndarray, float, float]) -> None:
    flags = ["--model", model, "--data", items, "--batch-size", 15, "--device", "xla"]
    result = run_xla(*flags, program="scripts/eval_hellaswag.py", CPU_NUM_DEVICES="4")
    assert shown(succeed(result)) == expected[1:]
    assert "warning: XLA" not in result.stderr


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, items: Path) -> list[object]:
    split = make_split(tmp_path_factory.mktemp("documents") / "data")
    return [
        *MODEL_FLAGS, "--train-dir", split.parent / "train", "--valid-dir", split, "--train-steps", 4, "--warmup-steps", 0,
        "--train-batch-size", 2, "--gradient-accum-step", 1, "--eval-batch-size", 8, "--valid-interval", 2,
        "--valid-steps", 2, "--hellaswag-interval", 2, "--hellaswag-data", items,
    ]  # fmt: skip


def assert_logged(folder: Path, items: Path) -> None:
    """Twice, and the second time what the checkpoint of that step says."""
    lines = [line for line in metrics(folder) if "hellaswag_acc" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert [line["hellaswag_items"] for line in lines] == [ITEMS] * 2
    _, acc, acc_norm = reference_log_probabilities(folder / "step-00000004", items_of(items))
    # Four steps from random weights, endings of the same words are close: an item or two may be decided by rounding.
    assert lines[-1]["hellaswag_acc"] == pytest.approx(acc, abs=2 / ITEMS)
    assert lines[-1]["hellaswag_acc_norm"] == pytest.approx(acc_norm, abs=2 / ITEMS)


@pytest.mark.slow
def test_in_a_training_run_on_xla_each_length_is_compiled_once(
    training: list[object], items: Path, tmp_path: Path
) -> None:
    result = run_xla(*training, "--checkpoints-dir", tmp_path, program="tests/workers/compile_count_worker.py")
    *text, counts = succeed(result).splitlines()
    # Training, validation, rows of 128 tokens; those of 192 have the validation step's shape, and so its program.
    assert json.loads(counts)["end"]["compiles"] == 3
    assert json.loads(counts)["end"]["fallbacks"] == 0
    assert [line for line in text if "compiling the HellaSwag" in line] == [
        f"compiling the HellaSwag step of {length} tokens (on a TPU this takes minutes) ..." for length in (128, 192)
    ]
    assert "warning: XLA" not in result.stderr
    assert_logged(tmp_path, items)
    assert any(line.startswith("step      2: HellaSwag acc ") for line in text)


@pytest.mark.slow
def test_in_a_training_run_of_two_replicas(training: list[object], items: Path, tmp_path: Path) -> None:
    result = run_xla(*training, "--checkpoints-dir", tmp_path, CPU_NUM_DEVICES="2")
    succeed(result)
    assert "warning: XLA" not in result.stderr
    assert_logged(tmp_path, items)


def test_buckets_reach_the_models_length() -> None:
    assert bucket_lengths(1024) == [128, 256, 512, 1024]
    assert bucket_lengths(192) == [128, 192]
    assert bucket_lengths(128) == [128]
    assert bucket_lengths(64) == [64]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" How to dive [title] Find a pool. [step] Jump", "How to dive. Find a pool. Jump"),
        ("[header] How to  dive [substeps]", " How to dive "),
        ("a [title]", "a. "),
        ("no [end", "no [end"),
    ],
)
def test_marks_of_wikihow_go(text: str, expected: str) -> None:
    """By hand, as the harness's two replacements and one expression give it."""
    assert clean(text) == expected


GOOD = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e", "f", "g"], "label": "0"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is not JSON lines"),
        ("", "holds no items"),
        ("[1]", "line 1: is not one of HellaSwag's"),
        (json.dumps({**GOOD, "endings": ["d"]}), "line 1: an item has 4 endings"),
        (json.dumps({**GOOD, "label": ""}), "line 1: is not one of HellaSwag's"),
        (json.dumps({**GOOD, "label": 4}), "line 1: an item has 4 endings, and a label from 0 to 3"),
        (json.dumps({name: GOOD[name] for name in GOOD if name != "ctx_b"}), "line 1: lacks ctx_b"),
        (json.dumps({**GOOD, "endings": ["d", "e", "f", "g" * 300]}), "item 1: its answer 4 has 301 tokens"),
    ],
)
def test_what_is_wrong_with_items_is_said_before_the_first_step(line: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text(line + "\n")

    def encoded() -> None:
        asked = questions(read_items(str(tmp_path / "items.jsonl"), "--hellaswag-data"))
        encode("HellaSwag", asked, load_tokenizer("bytes"), seq_length=192)

    with pytest.raises(InputError, match=re.escape(says)) as error:
        encoded()
    assert "\n" not in str(error.value)


def refused(result: subprocess.CompletedProcess[str], says: str) -> None:
    assert result.returncode == 2, result.stderr
    assert says in result.stderr.splitlines()[-1]


def test_training_needs_a_tokenizer_and_items(data_flags: list[str], tmp_path: Path) -> None:
    flags = [*data_flags, "--hellaswag-interval", 2, "--checkpoints-dir", tmp_path / "c", *MODEL_FLAGS]
    refused(run_here("run_pretrain.py", *flags), "--hellaswag-interval 2 needs a tokenizer")
    refused(
        run_here("run_pretrain.py", *flags, "--tokenizer", "bytes", "--hellaswag-data", tmp_path / "none.jsonl"),
        "--hellaswag-data",
    )
    assert not (tmp_path / "c").exists()


def test_items_from_the_hub(
    model: Path, items: Path, expected: tuple[np.ndarray, float, float], tmp_path: Path
) -> None:
    """A stand-in for the hub, with the validation set in the form and under the name that it has there."""
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([item | {"label": str(item["label"])} for item in items_of(items)]), table)
    with Hub("Rowan/hellaswag", {"data/validation-00000-of-00001.parquet": table.getvalue()}) as hub:
        own = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "",
        }
        assert shown(succeed(run("scripts/eval_hellaswag.py", "--model", model, **own))) == expected[1:]
        hub.shutdown()
    away = own | {"HF_HOME": str(tmp_path / "other"), "HF_HUB_OFFLINE": "1"}
    refused(
        run("scripts/eval_hellaswag.py", "--model", model, **away), "name its validation set as JSON lines with --data"
    )
