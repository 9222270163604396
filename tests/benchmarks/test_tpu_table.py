"""benchmarks/tpu_table.py and the rows of JAX's trainers, by figures counted by hand. Nothing is compiled."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from gpt2xla.tpu_check.hlo import Program

sys.path.append(str(ROOT / "benchmarks"))

import peer_costs
import peer_kernels
import tpu_table

sys.path.pop()  # its generation.py would hide tests/generation

FITS = {"topology": "v5e-8", "fits": True, "peak_gib": 8.3, "memory_gib": 15.75}
OURS = {**FITS, "step": "ours", "sequences_per_device": 32, "flops": 27e12, "bytes": 90e9, "cycles": 300e6}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def last_row(*rows: dict) -> list[str]:
    return cells(tpu_table.table(list(rows))[-1])


def test_the_table_gives_each_trainers_costs_per_32_sequences_and_ours_as_a_share():
    reference = {**FITS, "step": "reference", "sequences_per_device": 16}
    reference |= {"flops": 14e12, "bytes": 120e9, "cycles": 400e6}
    row = last_row(OURS, reference)
    assert row == ["v5e-8", "reference", "16", "8.30 of 15.75", "28.0", "240", "800", "0.38, 0.38"]
    assert last_row(reference, OURS)[-1] == ""


def test_estimates_of_looping_trainers_are_marked():
    peer = {**OURS, "step": "Levanter, data parallel", "flops": 28e12, "bytes": 160e9, "cycles": 600e6}
    assert last_row(OURS, {**peer, "counted_by_us": True})[4:] == ["~28.0 + kernels", "~160", "600", "0.50, 0.56"]
    assert last_row(OURS, {**peer, "counted_by_us": False})[4:] == ["28.0 + kernels", "160", "600", "0.50, 0.56"]


def test_a_step_that_does_not_fit_or_compile_and_one_of_another_tpu_are_not_compared():
    large = {**OURS, "step": "reference", "fits": False, "peak_gib": 18.2}
    assert last_row(OURS, large)[3:] == ["18.20 of 15.75", "does not fit", "", "", ""]
    refused = {"topology": "v5e-8", "step": "Levanter, data parallel", "sequences_per_device": 32, "fits": False}
    assert last_row(OURS, {**refused, "refused": "Mosaic failed"})[3:] == ["", "does not compile", "", "", ""]
    assert last_row(OURS, {**OURS, "step": "reference", "topology": "v6e-8"})[-1] == ""
    assert "v5e-8, Levanter, data parallel: Mosaic failed" in "\n".join(
        tpu_table.foot([{**refused, "refused": "Mosaic failed"}])
    )


def test_a_new_row_replaces_its_own_and_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tpu_table, "RESULTS", tmp_path)
    peer = {**OURS, "step": "Levanter, data parallel", "cycles": 600e6}
    tpu_table.add([peer, OURS, {**OURS, "topology": "v3-8"}])
    tpu_table.add([{**OURS, "cycles": 150e6}])
    lines = [cells(line) for line in (tmp_path / "tpu_124m.md").read_text().splitlines()[2:5]]
    assert [(line[0], line[1], line[6], line[7]) for line in lines] == [
        ("v3-8", "ours", "300", ""),
        ("v5e-8", "ours", "150", ""),
        ("v5e-8", "Levanter, data parallel", "600", "0.25, 1.00"),
    ]


def test_rows_that_are_not_compiled_again_keep_their_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tpu_table, "RESULTS", tmp_path)
    for day, topology in (("2026-11-22", "v3-8"), ("2026-11-21", "v5e-8"), ("2026-11-28", "v6e-8")):
        monkeypatch.setattr(tpu_table, "today", lambda day=day: day)
        tpu_table.add([{**OURS, "topology": topology}])
    assert (tmp_path / "tpu_124m.md").read_text().splitlines()[-1].startswith("2026-11-21 to 2026-11-28, libtpu")


def test_a_search_begins_with_the_answer_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    begun = []

    def find_batch(config: object, options: object, topology: str, *_: object, first: list[int], **__: object) -> dict:
        begun.append(first)
        return {**FITS, "topology": topology, "sequences_per_device": 40, "too_many": 44}

    monkeypatch.setattr(tpu_table, "RESULTS", tmp_path)
    monkeypatch.setattr(tpu_table, "find_batch", find_batch)
    for day in ("2026-11-21", "2026-11-28"):
        monkeypatch.setattr(tpu_table, "today", lambda day=day: day)
        tpu_table.fits(["gpt2-medium"], ["v5e-8"])
    assert begun == [[], [40, 44]]
    last = cells((tmp_path / "tpu_fits.md").read_text().splitlines()[2])
    assert last == ["gpt2-medium", "v5e-8", "40", "44", "8.30 of 15.75", "2026-11-28"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--maxtext", "nowhere"], "--maxtext nowhere: no src/MaxText/train_compile.py there"),
        (["--levanter", "nowhere"], "--levanter nowhere: no src/levanter/trainer.py there"),
        (["--reference", "nowhere"], "--reference nowhere: no gpt2/model.py there"),
        (["--levanter", "."], "need --peers-python"),
        (["--levanter", ".", "--peers-python", "nowhere"], "--peers-python nowhere: no such program"),
    ],
)
def test_a_missing_path_is_one_line(flags: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "src" / "levanter").mkdir(parents=True)
    (tmp_path / "src" / "levanter" / "trainer.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tpu_table.py", *flags])
    with pytest.raises(tpu_table.InputError) as error:
        tpu_table.main()
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_step_that_fails_is_reported_after_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The peers' Python is one that writes no step, or is killed as for want of memory."""
    (tmp_path / "src" / "MaxText").mkdir(parents=True)
    (tmp_path / "src" / "MaxText" / "train_compile.py").touch()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *scan_layers*) kill -9 $$;; esac\necho "no module" >&2; exit 3\n')
    python.chmod(0o755)
    monkeypatch.setattr(tpu_table, "RESULTS", tmp_path)
    flags = ["--maxtext", str(tmp_path), "--peers-python", str(python), "--skip-ours", "--topologies", "v5e-8"]
    monkeypatch.setattr(sys, "argv", ["tpu_table.py", *flags])
    with pytest.raises(tpu_table.RunFailed) as error:
        tpu_table.main()
    first, second = str(error.value).split("; v5e-8")
    assert "unrolled" in first
    assert "was killed, most likely because memory ran out" in first
    assert "defaults" in second
    assert second.endswith("ended with exit code 3: no module")


def test_the_peers_programs_need_nothing_of_ours():
    for name in ("peer_lowering", "peer_maxtext", "peer_levanter"):
        code = f"import sys; sys.path.insert(0, 'benchmarks'); import {name}; print({{'jax', 'gpt2xla'}} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-I", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "set()"


# A loop of 10 (12 less the two that fill the pipeline) steps. Each bundle is a cycle, a vdelay as many more.
SCHEDULE = """
LB: loop body
     0   :  { %1 = smov 0 }
   0x1 LB: > { %2 = sphi }
   0x2   : > { %3 = sbr.rel (%p1) target bundleno = 30 (0x1e), region = 9 }
   0x3   : > { %4 = vnop }
   0x4   : > { %5 = vnop }
   0x5   : > { %6 = vnop }
   0x6   : > { %7 = vnop }
   0x7   : > { %8 = sbr.rel (%p2) target bundleno = 14 (0xe), region = 11 }
   0x8   : > { %9 = vnop }
   0x9   : > { %10 = vnop }
   0xa   : > { %11 = vnop }
   0xb   : > { %12 = vnop }
   0xc   : > { %13 = vst }
   0xd   : > { %14 = vdelay 5 }
   0xe PF: > { %15 = sld } /* Start/End empty region 11 */
  0x1e PF: > { %16 = sld } /* Start/End empty region 9 */
  0x1f   : > { %17 = scmp.ge.s32.totalorder %2, 12 /* loop exit test */ }
  0x20   : > { %18 = sbr.rel (!%17) target bundleno = 1 (0x1), region = 20 }
  0x21   : > { %19 = vnop }
  0x22   : > { %20 = vnop }
  0x23   : > { %21 = vnop }
  0x24   : > { %22 = vnop }
  0x25   :  { %23 = vnop }
"""


def test_cycles_of_a_kernel_are_bundles_and_stalls_of_the_parts_that_run():
    schedule = peer_kernels.schedule_of(SCHEDULE)
    assert schedule == peer_kernels.Schedule(steps=10, always=19, parts=[2 + 5])
    # Two rows of 2 x 2 blocks: 4 steps each, 2 starts, 2 ends, and 3 blocks, since one is in the future.
    both = peer_kernels.Schedule(8, 100, [10, 1000, 20])
    assert peer_kernels.call_cycles(both, rows=2, blocks=2) == 2 * (4 * 100 + 2 * 10 + 3 * 1000 + 2 * 20)
    assert peer_kernels.call_cycles(both, rows=4, blocks=2) == peer_kernels.call_cycles(both, rows=2, blocks=2)
    with pytest.raises(AssertionError):
        peer_kernels.call_cycles(both, rows=3, blocks=2)


PROGRAM = """
%body (state: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %state = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %all = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %w = f32[8,8]{1,0} get-tuple-element(%state), index=2
  %one = f32[1,8]{1,0} dynamic-slice(%all, %n, %n), dynamic_slice_sizes={1,8}
  %made = f32[1,8]{1,0} dot(%one, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %new = f32[4,8]{1,0} dynamic-update-slice(%all, %made, %n, %n)
  ROOT %next = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%n, %new, %w)
}

ENTRY %main (a: f32[4,8], b: f32[8,8]) -> (s32[], f32[4,8], f32[8,8]) {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%zero, %a, %b)
  ROOT %loop = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) while(%start), body=%body, TRIPS
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"4"}}')


def test_what_a_loop_does_counts_as_often_as_it_is_done_and_slices_as_what_they_move():
    program = Program.parse(PROGRAM)
    instruction = dict(program.computations["body"])
    row, weight = 4 * 8, 4 * 64
    assert peer_costs.bytes_accessed(program, "body", instruction["one"]) == 2 * row
    assert peer_costs.bytes_accessed(program, "body", instruction["made"]) == 2 * row + weight
    assert peer_costs.bytes_accessed(program, "body", instruction["new"]) == 2 * row
    assert peer_costs.loops_over_once(program) == (4, 4)
