"""MMLU's scores against a plain loop over Hugging Face's model in float64, on any devices; its files and prompts."""

import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from conftest import run, run_here, run_xla, succeed, torchrun
from data.hub_server import Hub
from evals.small import MMLU_SUBJECTS, make_mmlu, make_model, reference_mmlu

from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.config import TorchConfig, TrainConfig
from gpt2xla.data.tokenizer import load_tokenizer, train_bpe
from gpt2xla.errors import InputError
from gpt2xla.evals.mmlu import GROUPS, SUBJECTS, Item, chosen_subjects, questions, read_items, result
from gpt2xla.evals.multiple_choice import MultipleChoice, ask, encode
from gpt2xla.runtime.torch.runtime import TorchRuntime

SUBJECTS_FLAGS = ["--subjects", *MMLU_SUBJECTS]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mmlu(tmp_path_factory.mktemp("mmlu") / "data")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of words, to which each answer is one token."""
    tokenizer = train_bpe(["Answer: A B C D which group is cyclic"] * 4, "words", 300, 2)
    return make_model(tmp_path_factory.mktemp("models") / "words", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def expected(model: Path, data: Path) -> tuple[np.ndarray, dict[str, list[bool]]]:
    return reference_mmlu(model, data, shots=1)


def test_57_subjects_in_four_groups() -> None:
    assert [len(GROUPS[name]) for name in ("humanities", "other", "social_sciences", "stem")] == [13, 13, 12, 19]
    assert len(set(SUBJECTS)) == 57
    assert chosen_subjects(()) == SUBJECTS
    assert chosen_subjects(("stem", "virology", "anatomy")) == ["virology", *GROUPS["stem"]]


def test_the_prompt_is_the_harnesss(tmp_path: Path) -> None:
    """Letter by letter, from its task files: the subject, an example with its answer, and the question."""
    for split, question in (("dev", " Is it?\n"), ("test", "Is it\nnot?")):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"us_foreign_policy_{split}.csv").write_text(f'"{question}",yes,"no, never ",2,3.0,B\n')
    items = read_items(str(tmp_path), "--data", 1, ["us_foreign_policy"])
    assert items.asked == [Item("us_foreign_policy", "Is it\nnot?", ("yes", "no, never ", "2", "3.0"), 1)]
    (asked,) = questions(items)
    assert asked.context == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        "Is it?\nA. yes\nB. no, never \nC. 2\nD. 3.0\nAnswer: B\n\n"
        "Is it\nnot?\nA. yes\nB. no, never \nC. 2\nD. 3.0\nAnswer:"
    )
    assert list(asked.answers) == ["A", "B", "C", "D"]


def test_the_authors_files_and_the_hubs_are_the_same_items(data: Path) -> None:
    by_form = [read_items(str(place), "--data", 2, list(MMLU_SUBJECTS)) for place in (data, data / "tar")]
    assert by_form[0] == by_form[1]
    assert {subject: len(shown) for subject, shown in by_form[0].examples.items()} == dict.fromkeys(MMLU_SUBJECTS, 2)
    assert len(by_form[0].asked) == sum(MMLU_SUBJECTS.values())


def test_log_probabilities_and_scores_equal_a_plain_loop(
    model: Path, data: Path, expected: tuple[np.ndarray, dict[str, list[bool]]]
) -> None:
    """In batches that do not divide them, with contexts beyond the model's length; each context is read once."""
    items = read_items(str(data), "--data", 1, list(MMLU_SUBJECTS))
    rows = encode("MMLU", questions(items), load_tokenizer(str(model)), 192)
    lengths = [len(tokens) - 1 for tokens in rows.tokens]
    assert max(lengths) == 192
    assert rows.last_tokens is not None
    assert rows.last_tokens.shape == (len(items.asked), 4)
    config, weights = load_weights(model)
    ours, runtime = build_model(config, weights, model), TorchRuntime(TorchConfig(), TrainConfig(compile=False))
    runtime.setup_model(ours)
    choice = MultipleChoice("MMLU", rows, ours, runtime, 5)
    assert choice.tokens == sum(128 if length <= 128 else 192 for length in lengths)
    found = choice.run()
    np.testing.assert_allclose(found, expected[0], rtol=1e-5, atol=1e-4)
    scored = result(items, found)
    for subject, right in expected[1].items():
        share, error = statistics.mean(right), statistics.stdev(map(float, right)) / math.sqrt(len(right))
        assert scored.score([subject])[:2] == pytest.approx((share, error))


def test_answers_of_two_tokens_have_one_input_too(data: Path, tmp_path: Path) -> None:
    """To a model of bytes a blank and a letter are two tokens, of which only the last one differs."""
    by_bytes = make_model(tmp_path / "bytes")
    items = read_items(str(data), "--data", 0, ["astronomy", "formal_logic"])
    asked = questions(items)
    rows = encode("MMLU", asked, load_tokenizer("bytes"), 192)
    assert set(rows.answer_tokens) == {2}
    assert rows.last_tokens is not None
    (found,) = ask({"MMLU": asked}, by_bytes, None, TorchRuntime(TorchConfig(), TrainConfig()), 3)
    log_probabilities, right = reference_mmlu(by_bytes, data, shots=0)
    starts = {"astronomy": 27, "formal_logic": 0}  # in the order of the file
    of_file = [starts[item.subject] + number for item, number in zip(items.asked, [*range(7), *range(9)], strict=True)]
    np.testing.assert_allclose(found, log_probabilities[of_file], rtol=1e-5, atol=1e-4)
    assert result(items, found).right.tolist() == right["astronomy"] + right["formal_logic"]


def test_groups_are_weighted_by_size_and_errors_are_the_harnesss(
    data: Path, expected: tuple[np.ndarray, dict[str, list[bool]]]
) -> None:
    """By lm-evaluation-harness's `aggregate_subtask_metrics` and `pooled_sample_stderr`."""
    items = read_items(str(data), "--data", 1, list(MMLU_SUBJECTS))
    scored = result(items, expected[0])

    def pooled(subjects: list[str]) -> tuple[float, float, int]:
        sizes = [len(expected[1][subject]) for subject in subjects]
        shares = [statistics.mean(expected[1][subject]) for subject in subjects]
        errors = [statistics.stdev(map(float, expected[1][s])) / math.sqrt(len(expected[1][s])) for s in subjects]
        variance = sum((n - 1) * error**2 * n for n, error in zip(sizes, errors, strict=True))
        error = math.sqrt(variance / (sum(sizes) - len(sizes)) / sum(sizes))
        return sum(p * n for p, n in zip(shares, sizes, strict=True)) / sum(sizes), error, sum(sizes)

    assert scored.score() == pytest.approx(pooled(list(MMLU_SUBJECTS)))
    groups = scored.scores()
    assert list(groups) == ["humanities", "social_sciences", "stem"]
    assert list(groups["stem"]) == ["stem", "abstract_algebra", "astronomy"]
    assert groups["stem"]["stem"] == pytest.approx(pooled(["abstract_algebra", "astronomy"]))


def assert_scored(output: str, file: Path, right: dict[str, list[bool]]) -> None:
    every = [one for subject in right.values() for one in subject]
    assert f"MMLU, 1-shot, acc {statistics.mean(every):.4f} ± " in output
    assert f"of {len(every)} items" in output
    written = json.loads(file.read_text())
    assert (written["shots"], written["acc"], written["items"]) == (
        1,
        pytest.approx(statistics.mean(every)),
        len(every),
    )
    assert written["groups"]["stem"]["astronomy"]["acc"] == pytest.approx(statistics.mean(right["astronomy"]))
    rows = [line.split("|")[1].strip() for line in file.with_suffix(".md").read_text().splitlines()[2:]]
    assert rows == ["**MMLU**", "**humanities**", "formal_logic", "**social_sciences**", "us_foreign_policy", "**stem**",
                    "abstract_algebra", "astronomy"]  # fmt: skip


@pytest.mark.slow
def test_one_and_two_processes_are_equal(
    model: Path, data: Path, expected: tuple[np.ndarray, dict[str, list[bool]]], tmp_path: Path
) -> None:
    flags = ["--model", model, "--data", data / "tar", "--shots", 1, "--batch-size", 6, *SUBJECTS_FLAGS]
    one = run_here("scripts/eval_mmlu.py", *flags, "--output", tmp_path / "one")
    assert_scored(succeed(one), tmp_path / "one.json", expected[1])
    two = torchrun(2, *flags, "--output", tmp_path / "two", program="scripts/eval_mmlu.py")
    assert_scored(succeed(two), tmp_path / "two.json", expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_on_xla_each_length_is_compiled_once(
    devices: int, model: Path, data: Path, expected: tuple[np.ndarray, dict[str, list[bool]]], tmp_path: Path
) -> None:
    flags = ["--model", model, "--data", data, "--shots", 1, "--batch-size", 6, *SUBJECTS_FLAGS, "--device", "xla"]
    result = run_xla(*flags, "--output", tmp_path / "t", program="scripts/eval_mmlu.py", CPU_NUM_DEVICES=str(devices))
    assert_scored(succeed(result), tmp_path / "t.json", expected[1])
    assert "warning: XLA" not in result.stderr
    compiled = re.findall(r"compiling the MMLU step of (\d+) tokens", result.stdout + result.stderr)
    lengths = encode(
        "MMLU",
        questions(read_items(str(data), "--data", 1, list(MMLU_SUBJECTS))), load_tokenizer(str(model)), 192,
    )  # fmt: skip
    assert sorted(map(int, compiled)) == sorted({128 if len(t) - 1 <= 128 else 192 for t in lengths.tokens})


@pytest.mark.slow
def test_items_from_the_hub(
    model: Path, data: Path, expected: tuple[np.ndarray, dict[str, list[bool]]], tmp_path: Path
) -> None:
    """A stand-in for the hub, which holds other files too. None of these is fetched."""
    files = {f"all/{file.name}": file.read_bytes() for file in (data / "all").iterdir()}
    own = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": ""}
    flags = ["scripts/eval_mmlu.py", "--model", model, "--shots", 1, *SUBJECTS_FLAGS, "--output", tmp_path / "hub"]
    with Hub("cais/mmlu", files | {"all/auxiliary_train-00000-of-00001.parquet": b"large"}) as hub:
        output = succeed(run(*flags, HF_ENDPOINT=hub.url, **own))
        hub.shutdown()
    assert_scored(output, tmp_path / "hub.json", expected[1])
    assert not list((tmp_path / "home").rglob("auxiliary_train*"))
    away = run(*flags, **own | {"HF_HOME": str(tmp_path / "other"), "HF_HUB_OFFLINE": "1"})
    assert away.returncode == 2
    assert "name a folder with its files with --data" in away.stderr.splitlines()[-1]


GOOD = "Is it?,yes,no,2,3,B\n"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "it holds neither all/test-*.parquet nor test/*_test.csv"),
        ({"test/astronomy_test.csv": GOOD}, "its test split has no items of anatomy; complete it"),
        (
            {"test/anatomy_test.csv": "Is it?,yes,no,2,B\n"},
            "anatomy_test.csv, item 1: it has no question with 4 choices",
        ),
        ({"test/anatomy_test.csv": GOOD + "Is it?,yes,no,2,3,E\n"}, "item 2: its answer is 'E', and must be A to D"),
        ({"test/anatomy_test.csv": "\xff\xfe"}, "anatomy_test.csv is not a file of MMLU"),
        ({"all/test-0.parquet": "no"}, "test-0.parquet is not a file of MMLU"),
        ({"test/anatomy_test.csv": GOOD}, "it holds neither all/dev-*.parquet nor dev/*_dev.csv"),
        (
            {f"{s}/anatomy_{s}.csv": GOOD for s in ("test", "dev")},
            "--shots 2: anatomy has 1 example; choose at most that",
        ),
    ],
)
def test_what_is_wrong_with_the_files_is_one_line(files: dict[str, str], says: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=re.escape(says)) as error:
        read_items(str(tmp_path), "--data", 2, ["anatomy"])
    assert "\n" not in str(error.value)


def test_an_unknown_subject_is_one_line() -> None:
    with pytest.raises(InputError, match=r"--subjects algebra: no such subject; choose a group \(humanities, "):
        chosen_subjects(("stem", "algebra"))
