"""EleutherAI's lm-evaluation-harness on a checkpoint folder as it is, by the command of docs/evaluation.md. The items are
made up, or real ones: every twentieth of HellaSwag where GPT2XLA_HELLASWAG names its validation set (.jsonl or .arrow), and
those subjects of MMLU that GPT2XLA_MMLU names after a folder (FOLDER:anatomy,management). GPT2XLA_MODEL names the model that
answers MMLU; without it, one of random weights.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import yaml
from conftest import ROOT, run, succeed
from evals.small import MMLU_SUBJECTS, MODEL_FLAGS, make_items, make_mmlu, make_model, make_split
from transformers import AutoTokenizer, GPT2LMHeadModel

from gpt2xla.config import TorchConfig, TrainConfig
from gpt2xla.evals import mmlu
from gpt2xla.evals.hellaswag import accuracy, questions, read_items
from gpt2xla.evals.multiple_choice import ask
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


def harness(model: Path, task: Path, output: Path, name: str) -> tuple[dict, Callable[[str], np.ndarray]]:
    """What that command reports with this model and task, and what gives the log-probabilities of a task in it."""
    (command,) = re.findall(r"^lm_eval .*$", (ROOT / "docs" / "evaluation.md").read_text(), re.MULTILINE)
    words = [re.sub(r"pretrained=[^,]*", f"pretrained={model}", word) for word in shlex.split(command)[1:]]
    words[words.index("hellaswag")] = name
    words += ["--include_path", str(task), "--output_path", str(output), "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(task / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    (results,) = output.rglob("results_*.json")

    def log_probabilities(name: str) -> np.ndarray:
        (samples,) = output.rglob(f"samples_{name}_*.jsonl")
        rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        return np.array([[float(pair[0]) for pair in row["filtered_resps"]] for row in rows])

    written = json.loads(results.read_text())
    return written["results"] | written.get("groups", {}), log_probabilities


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
    (values, found), (again, found_again) = (
        harness(folder, task, tmp_path / f"{folder.name}-scores", "local_hellaswag") for folder in (ours, theirs)
    )
    acc, acc_norm = (values["local_hellaswag"][name] for name in ("acc,none", "acc_norm,none"))
    assert (acc, acc_norm) == tuple(again["local_hellaswag"][name] for name in ("acc,none", "acc_norm,none"))
    log_probabilities = found("local_hellaswag")
    np.testing.assert_array_equal(log_probabilities, found_again("local_hellaswag"))

    asked = read_items(str(items), "--data")
    (own,) = ask({"HellaSwag": questions(asked)}, ours, None, TorchRuntime(TorchConfig(), TrainConfig()), 16)
    np.testing.assert_allclose(own, log_probabilities, rtol=1e-5, atol=1e-4)
    result = accuracy(asked, own)
    assert (result.acc, result.acc_norm) == (acc, acc_norm)
    assert f"acc {acc:.4f} ± " in succeed(run("scripts/eval_hellaswag.py", "--model", ours, "--data", items))


def write_mmlu_tasks(folder: Path, items: mmlu.Items, shots: int) -> str:
    """Write the harness's own tasks and their group, except for where the items come from; return the group's name."""
    tasks = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "mmlu" / "default"
    group = f"local_mmlu_{shots}"
    for subject, examples in items.examples.items():
        files = {}
        for split, rows in (("test", [item for item in items.asked if item.subject == subject]), ("dev", examples)):
            files[split] = str(folder / f"{subject}_{shots}_{split}.jsonl")
            of_file = [{"question": row.question, "choices": row.choices, "answer": row.label} for row in rows]
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in of_file))
        task = {
            "include": str(tasks / f"mmlu_{subject}.yaml"), "task": f"local_{subject}_{shots}", "tag": f"{group}_tasks",
            "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, "num_fewshot": shots,
        }  # fmt: skip
        (folder / f"{subject}_{shots}.yaml").write_text(yaml.safe_dump(task))
    metrics = [{"metric": "acc", "weight_by_size": True}]
    whole = {"group": group, "task": [f"{group}_tasks"], "aggregate_metric_list": metrics}
    (folder / f"{group}.yaml").write_text(yaml.safe_dump(whole))
    return group


@pytest.mark.parametrize("shots", [0, 5])
def test_the_harness_and_our_scores_agree_on_mmlu(shots: int, tmp_path: Path) -> None:
    """Log-probabilities, accuracies and standard errors of each subject and of all of them."""
    folder, _, names = os.environ.get("GPT2XLA_MMLU", "").partition(":")
    data, subjects = (folder, names.split(",")) if folder else (make_mmlu(tmp_path / "data"), list(MMLU_SUBJECTS))
    model = Path(os.environ.get("GPT2XLA_MODEL") or make_model(tmp_path / "model"))
    items = mmlu.read_items(str(data), "--data", shots, subjects)
    (tmp_path / "task").mkdir()
    # Its few-shot split must hold something even where it is not asked for.
    group = write_mmlu_tasks(tmp_path / "task", mmlu.read_items(str(data), "--data", 5, subjects), shots)
    values, found = harness(model, tmp_path / "task", tmp_path / "out", group)

    (own,) = ask({"MMLU": mmlu.questions(items)}, model, None, TorchRuntime(TorchConfig(), TrainConfig()), 16)
    result = mmlu.result(items, own)
    for subject in subjects:
        name = f"local_{subject}_{shots}"
        np.testing.assert_allclose(own[result.subjects == subject], found(name), rtol=1e-5, atol=1e-4)
        theirs = values[name]["acc,none"], values[name]["acc_stderr,none"]
        assert result.score([subject])[:2] == pytest.approx(theirs, rel=1e-12)
    assert result.score()[:2] == pytest.approx((values[group]["acc,none"], values[group]["acc_stderr,none"]), rel=1e-12)
