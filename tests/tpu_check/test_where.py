"""Where a step's cycles go, counted by hand in a small program."""

from pathlib import Path

import pytest

from gpt2xla.tpu_check.hlo import Program
from gpt2xla.tpu_check.origins import Origin, origin_of
from gpt2xla.tpu_check.topologies import TOPOLOGIES
from gpt2xla.tpu_check.traffic import moved_bytes
from gpt2xla.tpu_check.where import described, summary, work_of

# A forward product of two layers, whose weight is cast, the second for a checkpoint; its gradients; a product with a weight
# that goes around in a loop of 3 rounds, which counts by twos; one of three matrices in the optimizer; sums, kernels,
# collectives. Cycles are round numbers.
STEP = Path(__file__).with_name("step.hlo")

# Of one linear layer of 512 columns and inputs of 128, over 4 x 256 tokens.
LINEAR = 2 * 4 * 256 * 512 * 128


def test_parts_of_a_program() -> None:
    program = Program.parse(STEP.read_text())
    work = work_of(program)
    assert sum(group.cycles for group in work) == sum(program.cycles().values()), (
        "whatever has an estimate is in a part"
    )
    cycles = {"attention_forward": 400, "attention_backward": 600}
    kernels = {key: cycles[kernel.name] for key, kernel in program.kernels().items()}
    where = summary(work, kernels, TOPOLOGIES["v5e-8"])
    assert where["cycles"] == sum(program.cycles().values()) + 1000
    assert {row["part"]: (row["cycles"], row["instructions"]) for row in where["parts"]} == {
        "MLP products forward": (2100, 2),
        "MLP products backward dx": (1200, 1),
        "MLP products dW": (1300, 1),
        "attention kernels": (1000, 2),
        "qkv/proj products backward dx": (150, 3),  # the loop's weight is the program's argument, too
        "layer norm backward, residual gradient": (80, 1),  # most of its operations are
        "bias gradients": (70, 1),
        "copies and casts": (11, 1),
        "optimizer": (9, 1),
        "gradient norm": (7, 1),
        "collectives": (0, 4),
        "embedding and its gradient": (0, 1),
    }
    assert sum(row["share"] for row in where["parts"]) == pytest.approx(1, abs=0.002)
    by_name = {row["name"]: row for row in where["largest"]}
    assert by_name["h.*.mlp.c_fc forward"]["cycles"] == 1000
    assert by_name["h.*.mlp.c_fc forward again"]["cycles"] == 1100
    assert by_name["h.*.mlp.c_fc dW"]["shapes"] == "bf16[512,128] = [4,256,512] * [4,256,128]"
    assert by_name["h.*.attn backward (kernel)"]["cycles"] == where["kernels"] - 400 == 600
    # Prefetched weights do not move again.
    assert by_name["h.*.mlp.c_fc forward"]["bytes"] - by_name["h.*.mlp.c_fc forward again"]["bytes"] == 512 * 128 * 4
    flops = {group.name: group.flops for group in work if group.flops}
    assert flops == {
        "h.*.mlp.c_fc forward": LINEAR,
        "h.*.mlp.c_fc forward again": LINEAR,
        "h.*.mlp.c_fc backward dx": LINEAR,
        "h.*.mlp.c_fc dW": LINEAR,
        "h.*.attn.c_proj backward dx": 3 * LINEAR // 4,
        "optimizer": 3 * 2 * 8**3,  # three matrices, each times one
        "h.*.attn forward (kernel)": 262144,
        "h.*.attn backward (kernel)": 524288,
    }
    assert where["bound"] == round(sum(flops.values()) / (2 * 4 * 128**2))
    unknown = {row["part"]: row["unknown_bytes"] for row in where["parts"] if row["unknown_bytes"]}
    permuted, reduced, looked_up = 3 * 128 * 128 * 4, 512 * 128 * 4, 1024 * 4 + 4 * 256 * 128 * 2
    assert unknown == {"collectives": permuted + reduced, "embedding and its gradient": looked_up}
    text = described(where)
    assert f"bound {where['bound'] / 1e6:8.2f}: {where['bound'] / where['cycles']:.0%} of the cycles" in text
    assert "h.*.mlp.c_fc dW  bf16[512,128] = [4,256,512] * [4,256,128]" in text


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("model.1/h.0.659/h.0.mlp.15/h.0.mlp.c_fc.1/aten__mm", ("h.0.mlp.c_fc", "forward", ("mm",))),
        ("backward.2/h.1.mlp.3/aten__gelu_backward.4/aten__mul", ("h.1.mlp", "backward", ("gelu_backward", "mul"))),
        ("backward.2/model.3/h.0.4/h.0.ln_1.5/xla__cast", ("h.0.ln_1", "forward again", ("cast",))),
        ("backward.2/model.3/backward.4/h.0.ln_1.5/aten__sum", ("h.0.ln_1", "backward", ("sum",))),
        ("optimizer.1/aten__norm.2/aten__sum", ("optimizer", "forward", ("norm", "sum"))),
        ("aten__add", ("", "", ("add",))),
        ("copy", ("", "", ("copy",))),
    ],
)
def test_names_say_whose_an_operation_is(name: str, origin: tuple[str, str, tuple[str, ...]]) -> None:
    assert origin_of(name) == Origin(*origin)


def test_matrix_units_reach_the_peak_at_a_plausible_clock() -> None:
    """The clocks are those that Google published for v3 and v4; the others follow from sizes and peaks."""
    clocks = {name: topology.flops / topology.flops_per_cycle / 1e6 for name, topology in TOPOLOGIES.items()}
    assert clocks == pytest.approx({"v3-8": 940, "v4-8": 1050, "v5e-8": 1500, "v5p-8": 1750, "v6e-8": 1750}, rel=0.003)


# One row in eight is read, added to, and written into its place; another array only passes through; a third one is in fast
# memory.
PIECES = """\
HloModule pieces
%inner (p: f32[8,64]) -> f32[1,64] {
  %p = f32[8,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,64]{1,0} dynamic-slice(%p, %zero, %zero), dynamic_slice_sizes={1,64}
}
%pieces (a: f32[8,64], b: f32[8,64], c: f32[1,64]) -> (f32[8,64], f32[8,64]) {
  %a = f32[8,64]{1,0} parameter(0)
  %b = f32[8,64]{1,0} parameter(1)
  %c = f32[1,64]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,64]{1,0} fusion(%a), kind=kLoop, calls=%inner
  %sum = f32[1,64]{1,0} add(%row, %c)
  %new = f32[8,64]{1,0} dynamic-update-slice(%a, %sum, %zero, %zero)
  ROOT %t = (f32[8,64]{1,0}, f32[8,64]{1,0}) tuple(%new, %b)
}
ENTRY %main (a: f32[8,64], b: f32[8,64], c: f32[1,64]) -> (f32[8,64], f32[8,64]) {
  %a = f32[8,64]{1,0} parameter(0)
  %b = f32[8,64]{1,0} parameter(1)
  %c = f32[1,64]{1,0:S(1)} parameter(2)
  ROOT %f = (f32[8,64]{1,0}, f32[8,64]{1,0}) fusion(%a, %b, %c), kind=kLoop, calls=%pieces
}
"""


def test_only_what_moves_counts() -> None:
    program = Program.parse(PIECES)
    assert moved_bytes(program, "main", program.instruction("main", "f")) == 2 * 64 * 4
