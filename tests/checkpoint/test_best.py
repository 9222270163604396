"""The best validation: counts against brute force over random losses, resumed or not; its checkpoint, names and refusals."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN, metrics, run_here, succeed

from gpt2xla.checkpoint import run_folder, seal
from gpt2xla.checkpoint.best import Best, kept_in, name_best, prepare_best
from gpt2xla.checkpoint.loading import locate
from gpt2xla.checkpoint.start import find_start
from gpt2xla.cli import parse_run
from gpt2xla.config import RunConfig, TorchConfig
from gpt2xla.config.paths import best_checkpoint, check_model, check_resumed
from gpt2xla.errors import InputError
from gpt2xla.evals.validation import Validation, Validator
from gpt2xla.processes import signals
from gpt2xla.runtime.stop import Stopped


def options(root: Path, *flags: object) -> RunConfig:
    return parse_run(TorchConfig, ["--checkpoints-dir", str(root), *map(str, flags)])[0]


def test_counts_equal_a_brute_force_count_over_random_losses_with_resumes() -> None:
    draw = random.Random(0)
    for _ in range(500):
        levels = [math.nan, math.inf, *(draw.uniform(1, 2) for _ in range(4))]
        losses = [draw.choice(levels) + draw.choice([0, 0.01]) for _ in range(draw.randint(1, 30))]
        delta = draw.choice([0.0, 0.01, 0.2])
        best = Best()
        for number, loss in enumerate(losses, 1):
            best = best.after(10 * number, loss, delta)
            if draw.random() < 0.3:
                best = Best.load(json.loads(json.dumps(best.state())), 10 * number)
            finite = [(x, 10 * n) for n, x in enumerate(losses[:number], 1) if math.isfinite(x)]
            assert (best.loss, best.step) == min(finite, default=(None, 0))
            improvements: list[int] = []  # by a look over all validations again
            for n, x in enumerate(losses[:number]):
                if math.isfinite(x) and (not improvements or losses[improvements[-1]] - x > delta):
                    improvements.append(n)
            assert best.unimproved == (number - 1 - improvements[-1] if improvements else number)
            assert [best.has_ended(p) for p in (0, 1, 3)] == [False, best.unimproved >= 1, best.unimproved >= 3]


def test_a_state_that_no_run_makes_is_refused() -> None:
    good = Best().after(10, 2.5, 0.0).state()
    assert Best.load(good, 10) == Best(10, 2.5, 2.5, 0)
    wrong = (
        {"step": -1},
        {"step": True},
        {"step": 11},
        {"loss": math.nan},
        {"loss": 2},
        {"loss": None},
        {"unimproved": "1"},
    )
    for part in (*wrong, {"more": 1}):
        with pytest.raises((ValueError, TypeError)):
            Best.load(good | part, 10)
    with pytest.raises(ValueError, match="best validation"):
        Best.load({"step": 0}, 10)


class Script:
    """Lets a run's validations give scripted losses, and be cut off by a stop request."""

    def __init__(self, losses: dict[int, float]) -> None:
        self.losses, self.cut, self.measured = losses, set[int](), list[int]()
        self.signal: str | None = None  # which cuts off

    def validate(self, validator: Validator, step: int) -> Validation:
        self.measured.append(step)
        if step in self.cut:
            self.cut.remove(step)
            if self.signal:
                assert signals._active
                signals._active.received = self.signal
            raise Stopped
        return Validation(self.losses[step], None, 48, 3, None)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], Script]:
    def follow(losses: dict[int, float]) -> Script:
        from gpt2xla.evals.schedule import Evaluations

        made, evaluate, now = Script(losses), Evaluations.run, [0]

        def run(self: Evaluations, step: int, log: Callable) -> bool:
            now[0] = step
            return evaluate(self, step, log)

        monkeypatch.setattr(Evaluations, "run", run)
        monkeypatch.setattr(Validator, "run", lambda self: made.validate(self, now[0]))
        return made

    return follow


def train(root: Path, flags: list[str], *more: object) -> str:
    return succeed(run_here("run_pretrain.py", *flags, *SMALL_RUN, "--checkpoints-dir", root, *more))


def named(root: Path) -> tuple[int, float]:
    """What best.json says, after a check that a whole checkpoint and the link bear it out."""
    values = json.loads((root / "best.json").read_text())
    kept = root / f"step-{values['step']:08d}"
    assert seal.find_damage(kept) is None
    assert os.readlink(root / "best") == kept.name
    assert locate(f"{root}@best") == kept
    return values["step"], values["valid_loss"]


FAST = ["--valid-interval", 2, "--save-interval", 5, "--saved-checkpoint-limit", 1, "--gradient-accum-step", 1]


def test_the_best_is_saved_between_saves_named_and_never_pruned(
    script: Callable[[dict[int, float]], Script], data_flags: list[str], tmp_path: Path
) -> None:
    losses = {2: 3.0, 4: 2.5, 6: 2.7, 8: 2.6, 10: 2.9, 12: 2.4, 14: 2.4, 16: 2.8, 18: 2.9, 20: 2.6}
    script(losses)
    text = train(tmp_path / "run", data_flags, *FAST, "--keep-best")
    root = tmp_path / "run"
    assert named(root) == (12, 2.4)
    assert [f.name for f in run_folder.list_checkpoints(root)] == ["step-00000012", "step-00000020"]
    assert f"best checkpoint: {root}/step-00000012 (validation loss 2.4000), also {root}@best" in text
    assert "validation loss 2.6000, perplexity 13.46 on 48 tokens; best so far 2.5000 at step 4" in text
    assert "| best checkpoint | yes" in (root / "best" / "README.md").read_text()
    assert "best checkpoint" not in (root / "latest" / "README.md").read_text()
    assert not any("best" in key for line in metrics(root) for key in line)


def test_losses_that_are_measured_otherwise_do_not_compare(
    script: Callable[[dict[int, float]], Script], data_flags: list[str], tmp_path: Path
) -> None:
    script({10: 2.0, 20: 2.5, 22: 2.4})
    train(tmp_path, data_flags, "--keep-best")
    assert named(tmp_path) == (10, 2.0)
    text = train(tmp_path, data_flags, "--train-steps", 22, "--valid-steps", 2)
    assert "note: the best validation loss so far, 2.0000, counts no more" in text
    assert named(tmp_path) == (22, 2.4)


def test_a_run_is_finished_once_its_last_step_is_validated(
    script: Callable[[dict[int, float]], Script], data_flags: list[str], tmp_path: Path
) -> None:
    made = script({2: 3.0, 4: 2.5})
    made.cut, made.signal = {4}, "SIGTERM"
    flags = [*data_flags, *SMALL_RUN, *map(str, FAST), "--train-steps", "4", "--checkpoints-dir", str(tmp_path)]
    stopped = run_here("run_pretrain.py", *flags, "--keep-best")
    assert stopped.returncode == 143, stopped.stderr
    assert "stopped by SIGTERM after step 4, before the last evaluations were done; rerun the same" in stopped.stdout
    assert "done:" not in stopped.stdout, "the loss is that of step 2"
    text = succeed(run_here("run_pretrain.py", *flags, "--keep-best"))
    assert "done: validation loss 2.5000" in text
    assert "would begin" not in text, "updates stay as large as they are"
    assert named(tmp_path) == (4, 2.5)


def test_a_run_without_validations_may_measure_them_otherwise(
    script: Callable[[dict[int, float]], Script], data_flags: list[str], tmp_path: Path
) -> None:
    script({2: 2.0}).cut = {2}
    train(tmp_path, data_flags, "--keep-best", "--train-steps", 2)
    assert "counts no more" not in train(tmp_path, data_flags, "--train-steps", 2, "--valid-steps", 2)
    assert named(tmp_path) == (2, 2.0)


def test_a_run_ends_early_is_done_and_continues_with_more_patience(
    script: Callable[[dict[int, float]], Script], data_flags: list[str], tmp_path: Path
) -> None:
    losses = dict(zip(range(2, 22, 2), (3.0, 2.0, 2.1, 1.95, 2.2, 2.3, 2.4, 1.0, 2.0, 2.0), strict=True))
    script(losses)
    root, patience = tmp_path / "run", ["--early-stopping-patience", 3, "--early-stopping-min-delta", 0.1]
    text = train(root, data_flags, *FAST, *patience)
    why = "the validation loss has not improved by more than 0.1 in 3 validations; best 1.9500 at step 8"
    assert f"stopped: {why}\ncheckpoint: {root}/step-00000010\n" in text
    assert named(root) == (8, 1.95)
    before = (root / "metrics.jsonl").read_bytes()
    assert f"nothing to do: the run has ended early with {root}/step-00000010: {why}" in train(
        root, data_flags, *FAST, *patience
    )
    assert (root / "metrics.jsonl").read_bytes() == before
    assert "stopped: the validation loss has not improved by more than 0.1 in 5 val" in train(
        root, data_flags, *FAST, *patience, "--early-stopping-patience", 5
    )
    assert "done: validation loss 2.0000" in train(
        root, data_flags, *FAST, "--early-stopping-patience", 0, "--keep-best"
    )
    assert named(root) == (16, 1.0)


@pytest.mark.parametrize("seed", range(2))
def test_runs_that_are_cut_off_and_resumed_end_as_the_unbroken_one(
    seed: int, script: Callable[[dict[int, float]], Script], data_flags: list[str], tmp_path: Path
) -> None:
    """A stop cuts evaluations off; they are made up for, and the same checkpoint is resumed twice."""
    draw = random.Random(seed)
    losses = {step: round(draw.uniform(2, 3), 2) for step in range(2, 22, 2)}
    expected = Best()
    for step, loss in losses.items():
        if not expected.has_ended(4):
            expected, last = expected.after(step, loss, 0.05), step
    flags = [*FAST, "--early-stopping-patience", 4, "--early-stopping-min-delta", 0.05, "--saved-checkpoint-limit", 0]
    scripted, root = script(losses), tmp_path / "run"
    scripted.cut = set(draw.sample([step for step in losses if step <= last], 2))
    again = min(scripted.cut)
    while "nothing to do" not in train(root, data_flags, *flags):
        assert len(scripted.measured) < 20
    ended = torch.load(root / f"step-{last:08d}" / "training_state.pt", weights_only=True)["best"]
    marked = root / f"step-{last:08d}" / "EVALUATED"
    assert (json.loads(marked.read_text()) if marked.exists() else ended) == expected.state()
    assert named(root) == (expected.step, expected.loss)
    # The checkpoint whose evaluations were cut off: what counts after it does so once, however often it is resumed.
    cut = root / f"step-{again:08d}"
    counted = Best()
    for step in range(2, again + 1, 2):
        counted = counted.after(step, losses[step], 0.05)
    assert json.loads((cut / "EVALUATED").read_text()) == counted.state()
    scripted.measured.clear()
    text = train(root, data_flags, *flags, "--resume", cut)
    assert again not in scripted.measured
    if "nothing to do" not in text:
        assert find_start(options(root)).best == expected


def test_going_back_names_the_best_that_is_left(
    script: Callable[[dict[int, float]], Script], data_flags: list[str], tmp_path: Path
) -> None:
    losses = {2: 3.0, 4: 2.5, 6: 2.7, 8: 2.6, 10: 2.6, 11: 2.8, 12: 2.4, 14: 2.9, 16: 2.1, 18: 2.9, 20: 2.6}
    script(losses)
    root = tmp_path / "run"
    keep = [*FAST, "--keep-best", "--saved-checkpoint-limit", 0]
    train(root, data_flags, *keep)
    whole = Path(shutil.copytree(root, tmp_path / "whole", symlinks=True))
    text = train(root, data_flags, *keep, "--resume", root / "step-00000010", "--train-steps", 11)
    assert "best.json: best 2.5000 at step 4" in text
    assert (root / "abandoned-1-step-00000016").is_dir()
    assert named(root) == (4, 2.5)
    # The best of that past is gone: of the others, the log knows the lowest.
    shutil.rmtree(whole / "step-00000004")
    start = find_start(options(whole, "--resume", whole / "step-00000010"))
    assert (start.best.step, start.best.loss, start.best.to_beat) == (10, 2.6, 2.5)
    shutil.rmtree(whole / "step-00000002")
    (whole / "metrics.jsonl").unlink()
    start = find_start(options(whole, "--resume", whole / "step-00000010"))
    assert (start.best.step, start.best.loss, start.best.to_beat) == (0, None, 2.5)
    assert prepare_best(whole, start.best) == ["removed: best.json (no checkpoint here has a validation that counts)"]
    assert not (whole / "best").is_symlink()


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


def test_a_crash_between_the_writes_is_put_right_and_prune_spares_the_best(root: Path) -> None:
    old, new = Best(10, 3.5, 3.5), Best(20, 3.25, 3.25)
    name_best(root, old)
    assert run_folder.prune(root, root / "step-00000020", 1) == []
    assert named(root) == (10, 3.5)
    (root / "best").unlink()
    (root / "best.json").write_text("{")
    assert prepare_best(root, new) == ["best.json: best 3.2500 at step 20"]
    assert named(root) == (20, 3.25)
    assert prepare_best(root, new) == []
    assert prepare_best(root, None) == ["removed: best.json (--keep-best is off)"]
    assert not (root / "best").is_symlink()
    assert prepare_best(root, None) == []
    assert kept_in(root, Best(15, 1.0, 1.0, 2), 20).step in (10, 20)
    run_folder.prune(root, root / "step-00000020", 1)
    assert [f.name for f in run_folder.list_checkpoints(root)] == ["step-00000020"]


def test_a_checkpoint_of_an_older_version_resumes_and_a_damaged_state_is_refused(root: Path) -> None:
    folder = root / "step-00000020"
    training = torch.load(folder / "training_state.pt", weights_only=True)
    assert training.pop("best")["step"] in (10, 20)

    def store(**more: object) -> None:
        torch.save(training | more, folder / "training_state.pt")
        seal.seal(folder, 20)

    store()
    assert find_start(options(root)).best == Best()
    store(best={"step": 21, "loss": 1.0, "to_beat": 1.0, "unimproved": 0})
    with pytest.raises(InputError, match=r"training_state.pt does not hold the best validation of a run"):
        find_start(options(root))
    store(is_evaluated=False)
    (folder / "EVALUATED").write_text("")  # as older versions made it
    assert find_start(options(root)).best == Best()
    (folder / "EVALUATED").write_text('{"step": 1')
    with pytest.raises(InputError, match=r"EVALUATED does not hold the best validation of a run; delete that file"):
        find_start(options(root))


def test_at_best_is_the_best_checkpoint_or_refused(root: Path, tmp_path: Path) -> None:
    name = f"{root}@best"
    checks: tuple[Callable[[str], object], ...] = (
        locate, lambda name: check_model("--model", name), lambda name: check_resumed("--resume", name)
    )  # fmt: skip

    def refused(message: str, name: str = name) -> None:
        for check in checks:
            with pytest.raises(InputError, match=re.escape(message)):
                check(name)

    refused("has no best.json: --keep-best was not set")
    refused("no such folder", f"{tmp_path}/none@best")
    for content in ("{", "[]", '{"step": 10}', '{"step": "10", "valid_loss": 1.0}', '{"step": 10, "valid_loss": NaN}'):
        (root / "best.json").write_text(content)
        refused("best.json is damaged")
    (root / "best.json").write_text('{"step": 15, "valid_loss": 3.5}')
    refused("names step-00000015, which is not there")
    name_best(root, Best(10, 3.5, 3.5))
    assert locate(name) == root / "step-00000010"
    assert find_start(options(tmp_path / "new", "--from-checkpoint", name)).step == 10
    assert find_start(options(root, "--resume", name)).step == 10
    with pytest.raises(InputError, match=r"step-00000010 is older than step-00000020 beside it"):
        find_start(options(root, "--from-checkpoint", name))
    shutil.copytree(root / "step-00000020", name)  # a folder that is called so
    refused("may mean that folder or the best checkpoint")
    assert locate(f"{name}/") == Path(name)
    (root / "best.json").unlink()
    assert locate(name) == Path(name)
    assert best_checkpoint("gpt2") is None


def test_options_that_cannot_work_are_refused() -> None:
    for flags, message in {
        ("--early-stopping-patience", "2", "--valid-interval", "0"): "needs validations on the way",
        ("--early-stopping-patience", "-1"): "choose a number of at least 0",
        ("--early-stopping-min-delta", "nan"): "choose a number of at least 0",
        ("--early-stopping-min-delta", "0.1"): "has no meaning without --early-stopping-patience",
    }.items():
        with pytest.raises(InputError, match=message):
            parse_run(TorchConfig, list(flags))
    kept = {flags: parse_run(TorchConfig, flags.split())[0].train.keeps_best for flags in (
        "", "--keep-best", "--early-stopping-patience 2", "--early-stopping-patience 2 --no-keep-best")}  # fmt: skip
    assert list(kept.values()) == [False, True, True, False]
