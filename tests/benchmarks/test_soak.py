"""Long runs keep their threads, open files and memory: 300 steps here, and by figures made by hand what benchmarks/soak.py
says of 20,000."""

import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_RUN, metrics, run_here, succeed

from gpt2xla.checkpoint.saver import Saver

sys.path.append(str(ROOT / "benchmarks"))

import soak

sys.path.pop()  # its generation.py would hide tests/generation


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize("where", ["a folder", "a URL"])
def test_30_saves_and_validations_leave_threads_and_open_files_as_they_were(
    where: str, tmp_path: Path, data_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, save = list[tuple[int, ...]](), Saver.save

    def save_and_count(saver: Saver, step: int, is_evaluated: bool) -> None:
        save(saver, step, is_evaluated)
        assert saver.wait() == ""
        held.append(tuple(len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd")))

    monkeypatch.setattr(Saver, "save", save_and_count)
    folder = tmp_path / "run"
    place = folder if where == "a folder" else f"file://{folder}"
    changed = ["--train-steps", 300, "--decay-steps", 300, "--num-layers", 1, "--gradient-accum-step", 1]
    flags = [*data_flags, *SMALL_RUN, *changed, "--saved-checkpoint-limit", 2, "--scratch-dir", tmp_path / "scratch"]
    succeed(run_here("run_pretrain.py", *flags, "--checkpoints-dir", place))
    assert sum("valid_loss" in line for line in metrics(folder)) == len(held) == 30
    # A thread that is about to end, or a lease being renewed, may count now and then. The first save starts a thread.
    fewest_then, fewest_now = ([min(counts) for counts in zip(*part, strict=True)] for part in (held[1:11], held[20:]))
    assert fewest_now == fewest_then


def samples(resident: list[float], threads: list[int], peaks: list[float] | None = None) -> list[soak.Sample]:
    """One for each 100 steps."""
    peaks = peaks or resident
    return [
        soak.Sample(
            number * 1.0, 100 * number, resident[number - 1], 50.0, peaks[number - 1], threads[number - 1], 9, 1
        )
        for number in range(1, len(resident) + 1)
    ]


def verdicts(found: list[soak.Sample]) -> dict[str, bool]:
    return {row.name.split(",")[0]: row.grows for row in soak.compared(found)}


def test_what_grows_at_the_start_and_then_stays_is_flat() -> None:
    resident = [100.0 + min(number, 20) for number in range(40)]
    found = samples(resident, [4] * 40)
    assert not any(verdicts(found).values())
    assert soak.compared(found)[0].growth == pytest.approx((100 * (118.5 / 100.5 - 1), 0), abs=0.01)


def test_a_leak_of_three_percent_in_the_last_half_is_growth() -> None:
    found = verdicts(samples([100 * 1.0015**number for number in range(40)], [4] * 40))
    assert [name for name, grows in found.items() if grows] == ["resident memory", "highest so far"]


def test_a_thread_for_each_save_is_growth() -> None:
    assert verdicts(samples([100.0] * 40, [4 + number // 10 for number in range(40)]))["threads"]


def test_a_single_high_moment_is_seen_in_the_highest_alone() -> None:
    found = verdicts(samples([100.0] * 40, [4] * 40, [100.0] * 30 + [110.0] * 10))
    assert [name for name, grows in found.items() if grows] == ["highest so far"]


def test_the_launcher_alone_at_the_end_does_not_count() -> None:
    run = samples([100.0] * 40, [4] * 40)
    alone = run[-1]._replace(resident_mb=40.0, threads=1, peak_mb=40.0, processes=run[-1].processes - 1)
    assert soak.compared([*run, alone]) == soak.compared(run)


def test_the_table_says_how_much_and_that() -> None:
    *_, threads, files = soak.table(soak.compared(samples([100.0] * 40, [4] * 30 + [5] * 10)))
    assert threads == "| threads | 4 to 4 | +0.0% | 4 to 5 | +25.0% | grows by more than 2% |"
    assert files == "| open files | 9 to 9 | +0.0% | 9 to 9 | +0.0% | flat |"


def test_a_run_that_has_no_second_half_is_too_short_to_tell() -> None:
    with pytest.raises(SystemExit, match="too short"):
        soak.compared([sample._replace(step=900) for sample in samples([100.0] * 3, [4] * 3)])


def test_a_step_is_read_from_whole_lines_only(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert soak.newest_step(file) == 0
    file.write_text('{"step": 7, "loss": 1.0}\n')
    assert soak.newest_step(file) == 7
