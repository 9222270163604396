"""A folder with a chat model in the programs of others: TRL trains it further, EleutherAI's harness writes its prompts."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run, succeed
from generation.chat_model import ANSWERS, train

from gpt2xla.chat.conversations import Message
from gpt2xla.chat.template import ChatTemplate
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.model.loss import IGNORED_LABEL

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl: pip install trl")
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: pip install 'lm_eval[hf]'"
)
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {items}}}}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{do_sample: false, max_gen_toks: 15, until: []}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("chat") / "model")


@pytest.mark.slow
@needs_trl
def test_trl_trains_it_further_on_the_same_tokens(model: Path, tmp_path: Path) -> None:
    """With the loss on the assistant's words alone, its batch has our ids and our mask."""
    # Where torch_xla is installed, accelerate would use it, and fail.
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    result = run("tests/workers/trl_worker.py", model, tmp_path, PYTHONPATH=paths, USE_TORCH_XLA="0")
    theirs = json.loads(succeed(result).splitlines()[-1])
    tokenizer = load_tokenizer(str(model))
    template, expected = ChatTemplate.of(tokenizer), []
    assert template is not None
    for colour, answer in ANSWERS.items():
        ids, trained = template.encode(tokenizer, [Message("user", colour), Message("assistant", answer)])
        expected.append([ids.tolist(), np.where(trained, ids.astype(int), IGNORED_LABEL).tolist()])
    assert sorted(theirs["rows"]) == sorted(expected)
    assert theirs["loss"] < 0.5, "it has learned these answers before"
    assert theirs["changed"]


@pytest.mark.slow
@needs_lm_eval
def test_the_harness_asks_by_the_chat_template_and_answers_end(model: Path, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ANSWERS.items()))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "colours.yaml").write_text(TASK.format(items=items))
    words = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
        "--tasks",
        "colours",
        "--device",
        "cpu",
    ]
    words += ["--apply_chat_template", "--include_path", str(tmp_path / "task"), "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words, "--log_samples"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (results,), (samples,) = (tmp_path / "out").rglob("results_*.json"), (tmp_path / "out").rglob("samples_*.jsonl")
    assert json.loads(results.read_text())["results"]["colours"]["exact_match,none"] == 1.0
    tokenizer = load_tokenizer(str(model))
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        asked = [Message("user", sample["doc"]["question"])]
        expected = template.render(tokenizer, asked, add_generation_prompt=True).text
        assert sample["arguments"]["gen_args_0"]["arg_0"] == expected
