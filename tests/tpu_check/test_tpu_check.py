"""Compiling a run's training step for TPUs on a machine without one."""

import base64
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, require_xla, run

from gpt2xla.runtime.xla.versions import installed, release_for, why_no_kernels
from gpt2xla.tpu_check.hlo import Allocation, Program

SMALL = (
    "--num-layers 2 --d-model 128 --num-heads 2 --seq-length 256 --vocab-size 512 --gradient-accum-step 2 "
    "--mixed-precision bf16 --use-syncfree-optim"
).split()

# Twice a loop of 3 rounds around one product; the copy goes to fast memory, which counts as none.
TEXT = """\
HloModule step
%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0}) parameter(0)
  ROOT %d = (s32[], f32[8,128]{1,0}) fusion(%p), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"100"}
}
%product (a: f32[8,128]) -> f32[8,128] {
  ROOT %c = f32[8,128]{1,0} convolution(%a, %a)
}
ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %big = f32[1024,256]{1,0} broadcast(%x), metadata={op_name="h.3.7/h.3.mlp.1/aten__mm"}, config={"estimated_cycles":"5"}
  %fast = (f32[1024,256]{1,0:S(1)}, f32[1024,256]{1,0}, u32[]) copy-start(%big)
  %small = bf16[256]{0} negate(%big), metadata={op_name="aten__neg"}
  %w = (s32[], f32[8,128]{1,0}) while(%x), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[8,128]{1,0} add(%small, %big)
}
"""


def check(*flags: object) -> tuple[int, str]:
    require_xla()
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("needs libtpu: pip install -e '.[tpu-check]'")
    result = run("scripts/tpu_compile_check.py", *SMALL, *flags)
    return result.returncode, result.stdout + result.stderr


def test_cycles_count_loops_and_memory_counts_what_is_alive() -> None:
    program = Program.parse(TEXT)
    assert program.cycles() == {"other": 5, "matmul": 300}
    assert program.largest_at_peak()[:2] == [
        Allocation(1024 * 256 * 4, "f32[1024,256]", "h.3.mlp"),
        Allocation(8 * 128 * 4, "f32[8,128]", "w"),
    ]


def test_results_of_one_instruction_are_alive_each_for_itself() -> None:
    """The residual stream of a kernel is read at once, and what the backward pass needs of it is taken out late."""
    program = Program.parse("""\
ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %k = (f32[64,128]{1,0}, bf16[32,128]{1,0}) custom-call(%x), metadata={op_name="h.0.1/aten__add"}
  %stream = f32[64,128]{1,0} get-tuple-element(%k), index=0
  %next = f32[8,128]{1,0} negate(%stream), metadata={op_name="h.1.2/aten__neg"}
  %logits = f32[256,128]{1,0} broadcast(%next), metadata={op_name="loss.3/aten__mm"}
  %kept = bf16[32,128]{1,0} get-tuple-element(%k), index=1
  ROOT %out = f32[8,128]{1,0} add(%logits, %kept)
}
""")
    assert [(allocation.shape, allocation.origin) for allocation in program.largest_at_peak()] == [
        ("f32[256,128]", "loss"),
        ("bf16[32,128]", "h.0"),
        ("f32[8,128]", "h.1"),
    ]


def test_kernels_are_known_by_what_they_say_of_themselves() -> None:
    def call(result: str, name: str) -> str:
        body = base64.b64encode(f"... gpt2xla_{name} ...".encode()).decode()
        cost = '"cost_estimate":{"flops":"12","transcendentals":"0","bytes_accessed":"34"}'
        target, config = '"tpu_custom_call"', f'{{"custom_call_config":{{"body":"{body}",{cost}}}}}'
        return f"  %{result} = bf16[2,128]{{1,0}} custom-call(%x), custom_call_target={target}, backend_config={config}"

    lines = ["ENTRY %main (x: bf16[2,128]) -> bf16[2,128] {", "  %x = bf16[2,128]{1,0} parameter(0)"]
    lines += [call("a", "expand"), call("b", "attention_forward"), call("c", "expand"), "}"]
    kernels = Program.parse("\n".join(lines)).kernels().values()
    assert [(k.name, k.calls, k.flops, k.bytes) for k in kernels] == [
        ("expand", 2, 12, 34),
        ("attention_forward", 1, 12, 34),
    ]


def test_a_step_that_fits(tmp_path: Path) -> None:
    versions = installed(("torch", "jax"))
    if reason := why_no_kernels(release_for(versions), versions.get("jax")):
        pytest.skip(reason)
    code, output = check("--topology", "v5e-8", "--train-batch-size", 32, "--where", "--json", tmp_path / "report.json")
    assert code == 0, output
    (report,) = json.loads((tmp_path / "report.json").read_text())
    assert report["fits"]
    assert report["sequences_per_device"] == 4
    # Weights and two moments in fp32, and two micro-batches of ids and labels, which a TPU holds as two 32-bit halves.
    ids = 2 * 2 * 4 * 256 * 8
    assert report["arguments_gib"] * 2**30 == pytest.approx(3 * 4 * report["parameters"] + ids, rel=0.15)
    # 6 N per token, and seven products of scores; the compiler also counts what is no product.
    tokens, matrices = 2 * 4 * 256, 2 * 12 * 128**2 + 512 * 128
    products = 6 * matrices * tokens + 2 * 7 * 2 * 256 * 128 * tokens
    assert products < report["flops"] < 1.25 * products
    calls = {kernel["name"]: kernel["calls"] for kernel in report["kernels"]}
    assert len(calls) == 9, "attention, and the products with elementwise work around them"
    assert set(calls.values()) == {4}, "two layers, two micro-steps"
    assert report["cycles"] > report["kernel_cycles"] > 0
    seconds = report["cycles"] * 4 * 128**2 * 2 / 197e12  # the peak, of four matrix units of 128 x 128
    assert f"about {2 * 32 * 256 / seconds:,.0f} tokens per second on all devices together, an estimate" in output
    assert report["largest"], "an array at least, whatever it is in so small a model"
    assert f"fits, {report['peak_gib']:.2f} of 15.75 GiB" in output
    check_where(report["where"], report)
    # Each product of a linear layer is 2 * tokens * inputs * outputs, forward and for either gradient.
    bound = {row["part"]: row["bound"] for row in report["where"]["parts"]}
    for name, weights in {"MLP": 2 * 8 * 128**2, "qkv/proj": 2 * 4 * 128**2}.items():
        for role in ("forward", "backward dx", "dW"):
            assert bound[f"{name} products {role}"] == round(2 * tokens * weights / (2 * 4 * 128**2))
    assert bound["loss head products"] == round(3 * 2 * tokens * 512 * 128 / (2 * 4 * 128**2))
    assert bound["rest"] == 0, "each product has a part"
    for name, number in {"h.*.mlp.c_fc dW": 4, "h.*.attn backward (kernel)": 4}.items():
        assert re.search(rf"x{number} +{re.escape(name)}  ", output), name


def check_where(where: dict[str, Any], report: dict[str, Any]) -> None:
    """All cycles are in one part, and what the model is made of is found."""
    assert sum(row["cycles"] for row in where["parts"]) == where["cycles"] == report["cycles"]
    assert where["kernels"] == report["kernel_cycles"]
    assert sum(row["cycles"] for row in where["parts"] if row["part"] == "rest") < 0.05 * where["cycles"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_by_a_signal_it_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """To the program alone, as a job's end comes; at a terminal the processes that it started get Ctrl-C, too."""
    require_xla()
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("needs libtpu: pip install -e '.[tpu-check]'")
    with subprocess.Popen(
        [sys.executable, "scripts/tpu_compile_check.py", *SMALL, "--train-batch-size", "32"],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert "tracing" in process.stderr.readline()
        while not (children := list(tmp_path.glob("gpt2xla-*/request.json"))):
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        assert process.stderr.read() == ""
    assert not list(tmp_path.iterdir())
    commands = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists()]
    assert not any(str(children[0]).encode() in command for command in commands)


@pytest.mark.slow
def test_names_change_nothing_but_names() -> None:
    """In the traced graph, with Muon, accumulation, documents and checkpointed blocks."""
    require_xla()
    plain, named = (run("tests/workers/names_worker.py", how) for how in ("plain", "named"))
    assert plain.returncode == named.returncode == 0, plain.stderr + named.stderr
    assert plain.stdout == named.stdout
    assert "backward/model/backward/h.1.mlp.c_fc/aten__mm\n" in named.stderr
    assert "backward/model/h.1/h.1.mlp/h.1.mlp.c_fc/aten__mm\n" in named.stderr, "computed again"
    unnamed = {line for line in named.stderr.split("\n") if line.startswith("aten__") and "mm" in line}
    assert not unnamed, "each product has a module"


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_exit_code_3() -> None:
    code, output = check(
        "--topology", "v5e-8", "--train-batch-size", 8 * 1024, "--gradient-accum-step", 1, "--num-layers", 1,
        "--vocab-size", 50304, "--loss-chunks", 1,
    )  # fmt: skip
    assert code == 3, output
    assert "does NOT fit" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_sharded_steps_take_an_eighth_of_the_state(tmp_path: Path) -> None:
    reports = []
    for flags in ((), ("--spmd", "--fsdp"), ("--spmd", "--fsdp", "--optim-type", "muon"), ("--optim-type", "muon")):
        code, output = check(
            "--topology", "v5e-8", "--train-batch-size", 16, *flags, "--json", tmp_path / "report.json"
        )
        assert code == 0, output
        reports += json.loads((tmp_path / "report.json").read_text())
        check_where(reports[-1]["where"], reports[-1])
    whole, sharded = (report["arguments_gib"] * 2**30 for report in reports[:2])
    assert sharded < whole / 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--topology", "v9-8"), "--topology v9-8: unknown; choose among v3-8"),
        (("--train-batch-size", "12"), "--train-batch-size 12 does not divide over the 8 devices of v5e-8"),
        (("--json", "/no/such/folder/x.json"), "--json /no/such/folder/x.json: No such file or directory"),
        (("--num-heads", "3"), "--num-heads 3 does not divide --d-model 128"),
    ],
)
def test_wrong_flags_are_one_line(flags: tuple[str, ...], message: str) -> None:
    code, output = check(*flags)
    assert code == 2
    assert message in output
    assert "Traceback" not in output
