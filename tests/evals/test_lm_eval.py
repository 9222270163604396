"""EleutherAI's lm-evaluation-harness on a checkpoint folder as it is, by the command of docs/evaluation.md. The items are
made up, or every twentieth of HellaSwag's own where GPT2XLA_HELLASWAG names its validation set (.jsonl or .arrow).
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from conftest import ROOT, run, succeed
from evals.small import MODEL_FLAGS, make_items, make_split
from transformers import AutoTokenizer, GPT2LMHeadModel

from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.config import TorchConfig, TrainConfig
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.evals.hellaswag import HellaSwag, encode_items, read_items
from gpt2xla.runtime.torch.runtime import TorchRuntime

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: pip install 'lm_eval[hf]'"
)

# The harness's own task, except for where the items come from.
TASK = """
task: local_hellaswag
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {items}}}}}
output_type: multiple_choice
validation_split: validation
process_docs: !function processing.process_docs
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def write_items(file: Path) -> None:
    real = os.environ.get("GPT2XLA_HELLASWAG")
    if real is None:
        items = [item | {"label": str(item["label"])} for item in make_items(file)]
    elif real.endswith(".arrow"):
        items = pyarrow.ipc.open_stream(real).read_all().to_pylist()[::20]
    else:
        items = [json.loads(line) for line in Path(real).read_text(encoding="utf-8").splitlines()[::20]]
    file.write_text("".join(json.dumps(item) + "\n" for item in items))


def harness(model: Path, task: Path, output: Path) -> tuple[float, float, np.ndarray]:
    """acc, acc_norm and the log-probabilities, of that command with this model and task."""
    (command,) = re.findall(r"^lm_eval .*$", (ROOT / "docs" / "evaluation.md").read_text(), re.MULTILINE)
    words = [re.sub(r"pretrained=[^,]*", f"pretrained={model}", word) for word in shlex.split(command)[1:]]
    words[words.index("hellaswag")] = "local_hellaswag"
    words += ["--include_path", str(task), "--output_path", str(output), "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(task / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    (results,), (samples,) = output.rglob("results_*.json"), output.rglob("samples_*.jsonl")
    values = json.loads(results.read_text())["results"]["local_hellaswag"]
    rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    log_probabilities = np.array([[float(pair[0]) for pair in row["filtered_resps"]] for row in rows])
    return values["acc,none"], values["acc_norm,none"], log_probabilities


def test_the_harness_and_our_scores_agree_on_a_checkpoint_and_on_what_transformers_saves(tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    write_items(items)
    split = make_split(tmp_path / "data")
    flags = ["--train-dir", split.parent / "train", "--valid-dir", split, "--checkpoints-dir", tmp_path / "run"]
    length = 512 if "GPT2XLA_HELLASWAG" in os.environ else 192  # in bytes; the longest real endings are of some 400
    flags += ["--seq-length", length]
    steps = "--train-steps 30 --warmup-steps 5 --decay-steps 30 --learning-rate 0.01 --train-batch-size 4".split()
    succeed(run("run_pretrain.py", *MODEL_FLAGS, *flags, *steps, "--gradient-accum-step", 1, "--valid-steps", 1))
    ours, theirs = tmp_path / "run" / "step-00000030", tmp_path / "theirs"
    GPT2LMHeadModel.from_pretrained(ours).save_pretrained(theirs)
    AutoTokenizer.from_pretrained(ours).save_pretrained(theirs)

    task = tmp_path / "task"
    task.mkdir()
    (task / "local_hellaswag.yaml").write_text(TASK.format(items=items))
    (task / "processing.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    acc, acc_norm, log_probabilities = harness(ours, task, tmp_path / "a")
    again = harness(theirs, task, tmp_path / "b")
    assert (acc, acc_norm) == again[:2]
    np.testing.assert_array_equal(log_probabilities, again[2])

    config, weights = load_weights(ours)
    model = build_model(config, weights, ours)
    runtime = TorchRuntime(TorchConfig(), TrainConfig())
    runtime.setup_model(model)
    questions = encode_items(read_items(str(items), "--data"), load_tokenizer(str(ours)), length)
    result = HellaSwag(questions, model, runtime, 16).run()
    np.testing.assert_allclose(result.log_probabilities, log_probabilities, rtol=1e-5, atol=1e-4)
    assert (result.acc, result.acc_norm) == (acc, acc_norm)
    assert f"acc {acc:.4f} ± " in succeed(run("scripts/eval_hellaswag.py", "--model", ours, "--data", items))
