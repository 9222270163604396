"""MMLU (Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding"): questions from 57 subjects with four
answers each. Asked and scored as EleutherAI's lm-evaluation-harness does for its group `mmlu`: its prompts, and subjects
weighted by their number of questions.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from pyarrow import parquet

from gpt2xla import hub
from gpt2xla.errors import InputError, counted
from gpt2xla.evals.multiple_choice import Question
from gpt2xla.evals.options import markdown_table
from gpt2xla.logs.sinks import with_error

GROUPS = {
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""".split(),
    "other": """business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""".split(),
    "social_sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""".split(),
    "stem": """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""".split(),
}
SUBJECTS = [subject for subjects in GROUPS.values() for subject in subjects]
_LETTERS = "ABCD"
_HUB_ID = "cais/mmlu"
# Where a folder has the questions of a split: a download of the hub's, whole or by subject, or the authors' data.tar.
_PLACES = ("all/{0}-*.parquet", "*/{0}-*.parquet", "{0}/*_{0}.csv", "data/{0}/*_{0}.csv")


class Item(NamedTuple):
    """One question, its four answers, and the number of the right one, from 0."""

    subject: str
    question: str
    choices: tuple[str, ...]
    label: int

    @property
    def text(self) -> str:
        """The question and its answers, up to where the letter of the right one is asked for."""
        choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(_LETTERS, self.choices, strict=True))
        return f"{self.question.strip()}{choices}\nAnswer:"


class Items(NamedTuple):
    """The questions of some subjects."""

    asked: list[Item]  # the test split, subject by subject
    examples: dict[str, list[Item]]  # by subject, the first items of the dev split: shown with their answers


class Score(NamedTuple):
    """The accuracy on one subject, or on several together."""

    acc: float
    standard_error: float
    items: int


class Result(NamedTuple):
    """Of each item, whether the model chose the right answer."""

    subjects: np.ndarray  # of the items
    right: np.ndarray

    def score(self, subjects: Sequence[str] = SUBJECTS) -> Score:
        """Return the accuracy on those of `subjects` that were asked. Its standard error takes each subject's items as
        draws with one mean (the pooled variance of its own items)."""
        parts = [part for subject in subjects if len(part := self.right[self.subjects == subject])]
        right = np.concatenate(parts)
        squares = sum(len(part) * part.mean() * (1 - part.mean()) for part in parts)
        return Score(float(right.mean()), math.sqrt(squares / max(1, len(right) - len(parts)) / len(right)), len(right))

    def scores(self) -> dict[str, dict[str, Score]]:
        """Return the score of each group and of each subject in it, those that were asked."""
        asked = {name: [s for s in subjects if s in self.subjects] for name, subjects in GROUPS.items()}
        return {
            name: {name: self.score(subjects)} | {subject: self.score([subject]) for subject in subjects}
            for name, subjects in asked.items()
            if subjects
        }

    def as_dict(self) -> dict[str, Any]:
        groups = {group: {name: score._asdict() for name, score in of.items()} for group, of in self.scores().items()}
        return self.score()._asdict() | {"groups": groups}

    def __str__(self) -> str:
        acc, error, items = self.score()
        return f"acc {with_error(acc, error)} of {counted(items, 'item')}"


def result(items: Items, log_probabilities: np.ndarray) -> Result:
    """Return the result, from the (items, 4) log-probabilities; among equal ones the first answer is chosen."""
    labels = np.array([item.label for item in items.asked])
    return Result(np.array([item.subject for item in items.asked]), log_probabilities.argmax(1) == labels)


def questions(items: Items) -> list[Question]:
    """Return what the model is asked: the subject, its examples with their answers, and the question."""
    beginnings = {}
    for subject, examples in items.examples.items():
        about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        beginnings[subject] = about + "".join(f"{one.text} {_LETTERS[one.label]}\n\n" for one in examples)
    return [Question(beginnings[item.subject] + item.text, _LETTERS) for item in items.asked]


def markdown(found: Result) -> str:
    """Return the scores of all, each group and each subject as a table in Markdown."""
    rows = [("**MMLU**", found.score())]
    for group, scores in found.scores().items():
        rows += [(f"**{name}**" if name == group else name, score) for name, score in scores.items()]
    cells = [(name, f"{score.items:,}", f"{score.acc:.4f}", f"{score.standard_error:.4f}") for name, score in rows]
    return markdown_table(("Subject", "Items", "Accuracy", "Standard error"), cells)


def chosen_subjects(names: Sequence[str]) -> list[str]:
    """Return the subjects that `names`, of subjects or groups, mean: all without any. Raises InputError for another name."""
    for name in names:
        if name not in GROUPS and name not in SUBJECTS:
            raise InputError(
                f"--subjects {name}: no such subject; choose a group ({', '.join(GROUPS)}) or subjects such as {SUBJECTS[0]}"
            )
    chosen = {subject for name in names for subject in GROUPS.get(name, [name])}
    return [subject for subject in SUBJECTS if subject in chosen or not names]


def read_items(folder: str | None, option: str, shots: int, subjects: Sequence[str] = SUBJECTS) -> Items:
    """Read the items of `subjects`, with `shots` examples each, from a folder: a download of the hub's data set, or the
    authors' data.tar unpacked. Without a folder, fetch them from the hub. Raises InputError if there is no such folder, a
    subject or an example is missing, an item lacks something, or the hub did not return the data set."""
    root, where = (Path(folder), f"{option} {folder}") if folder is not None else (_from_hub(option), _HUB_ID)
    asked = _read_split(root, "test", where, subjects)
    known = _read_split(root, "dev", where, subjects) if shots else {}
    examples = {subject: known.get(subject, [])[:shots] for subject in subjects}
    for subject, shown in examples.items():
        if len(shown) < shots:
            raise InputError(f"--shots {shots}: {subject} has {counted(len(shown), 'example')}; choose at most that")
    return Items([item for subject in subjects for item in asked[subject]], examples)


def _read_split(root: Path, split: str, where: str, subjects: Sequence[str]) -> dict[str, list[Item]]:
    found_files = (sorted(root.glob(place.format(split))) for place in _PLACES)
    files = next(filter(None, found_files), [])
    if not files:
        expected = f"neither all/{split}-*.parquet nor {split}/*_{split}.csv"
        raise InputError(
            f"{where}: it holds {expected}; name a download of {_HUB_ID}, or the folder of MMLU's data.tar"
        )
    items: dict[str, list[Item]] = {subject: [] for subject in subjects}
    for file in files:
        try:
            for number, values in enumerate(_rows(file, split), 1):
                if values["subject"] in items:
                    items[values["subject"]].append(_item(values, f"{file}, item {number}"))
        except (OSError, KeyError, UnicodeDecodeError, csv.Error, pyarrow.ArrowInvalid) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise InputError(f"{file} is not a file of MMLU: {reason}; download it again") from None
    if missing := [subject for subject in subjects if not items[subject]]:
        others = f" and {counted(len(missing) - 1, 'other subject')}" if missing[1:] else ""
        fix = "complete it, or choose others with --subjects"
        raise InputError(f"{where}: its {split} split has no items of {missing[0]}{others}; {fix}")
    return items


def _rows(file: Path, split: str) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        yield from parquet.read_table(file).to_pylist()
        return
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for row in filter(None, csv.reader(lines, strict=True)):  # strict: a file that is cut within quotes is an error
            subject = file.stem.removesuffix(f"_{split}")
            yield {"subject": subject, "question": row[0], "choices": row[1:-1], "answer": row[-1]}


def _item(values: dict[str, Any], where: str) -> Item:
    question, choices, answer = (values.get(name) for name in ("question", "choices", "answer"))
    label = _LETTERS.find(answer) if isinstance(answer, str) and len(answer) == 1 else answer
    if not isinstance(question, str) or not isinstance(choices, list) or len(choices) != len(_LETTERS):
        raise InputError(f"{where}: it has no question with {len(_LETTERS)} choices; name MMLU's own files")
    if not isinstance(label, int) or not 0 <= label < len(_LETTERS):
        raise InputError(f"{where}: its answer is {answer!r}, and must be A to D or 0 to 3; name MMLU's own files")
    return Item(values["subject"], question, tuple(map(str, choices)), label)


def _from_hub(option: str) -> Path:
    with hub.explained("MMLU is read from the hub", _HUB_ID, f"name a folder with its files with {option}", "data set"):
        return hub.snapshot(_HUB_ID, ["all/test-*", "all/dev-*"], kind="dataset")
