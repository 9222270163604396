"""Cycles of the kernels in a peer's step: JAX's splash attention, for which the compiler has no estimate either.

They are counted as ours are (`gpt2xla.tpu_check.compile.kernel_cycles`): the bundles of the final schedule, one a cycle,
and its stalls, times the steps of the grid. Splash attention's steps hold parts that run conditionally: the start of a row
of blocks, the block itself unless it lies in the future, and the end of the row.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) .*?: .*\{")
_STALL = re.compile(r"vdelay (\d+)")
_BRANCH = re.compile(r"sbr\.rel \([^)]*\) target bundleno = \d+ \(0x[0-9a-f]+\), region = (\d+)")
_DELAY_SLOTS = 4  # bundles after a branch that run whether it is taken or not


class Kernel(NamedTuple):
    module: bytes  # StableHLO that calls it and nothing else
    rows: int  # sequences times heads
    blocks: int  # that a row has of queries, and as many of keys


class Schedule(NamedTuple):
    """The loop over the grid in a kernel's final schedule."""

    steps: int
    always: int  # cycles of one step without its conditional parts
    parts: list[int]  # cycles of each


def kernels_in(step: bytes) -> dict[str, Kernel]:
    """Return the kernels that a step in StableHLO calls, by their names."""
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir

    kernels: dict[str, Kernel] = {}

    def visit(operation: Any) -> Any:
        if operation.name != "stablehlo.custom_call" or "tpu_custom_call" not in str(
            operation.attributes["call_target_name"]
        ):
            return ir.WalkResult.ADVANCE
        name = ir.StringAttr(operation.attributes["kernel_name"]).value
        (block,) = {int(size) for size in re.findall(r"_block_\D+_(\d+)", name)}
        shapes = [ir.ShapedType(value.type).shape for value in operation.operands]
        B, H, T, _ = next(shape for shape in shapes if len(shape) == 4)
        kernels[name] = Kernel(mlir.module_to_bytecode(_alone(operation)), B * H, T // block)
        return ir.WalkResult.ADVANCE

    with mlir.make_ir_context():
        ir.Module.parse(step).operation.walk(visit)
    return kernels


def _alone(call: Any) -> Any:
    """Return a module whose arguments and results are those of `call`."""
    from jaxlib.mlir import ir

    takes, gives = ([str(value.type) for value in values] for values in (call.operands, call.results))
    text = call.get_asm(enable_debug_info=False)
    attributes = text[text.index("{") : text.rindex("} : (") + 1]
    parameters = ", ".join(f"%{number}: {kind}" for number, kind in enumerate(takes))
    arguments = ", ".join(f"%{number}" for number in range(len(takes)))
    results = ", ".join(f"%made#{number}" for number in range(len(gives)))
    return ir.Module.parse(
        f"func.func public @main({parameters}) -> ({', '.join(gives)}) {{\n"
        f"  %made:{len(gives)} = stablehlo.custom_call @tpu_custom_call({arguments}) {attributes}"
        f" : ({', '.join(takes)}) -> ({', '.join(gives)})\n"
        f"  return {results} : {', '.join(gives)}\n}}"
    )


def kernel_cycles(kernels: dict[str, Kernel], device: Any, dumped: Path) -> dict[str, int]:
    """Return the cycles of one call of each kernel. libtpu must dump its schedules to the folder `dumped`."""
    from jax._src.lib import xla_client

    cycles = {}
    for name, kernel in kernels.items():
        device.client.compile(kernel.module, xla_client.DeviceList((device,)), xla_client.CompileOptions())
        # Two programs are dumped: the kernel's and a frame around it, the shorter one.
        schedules = [f for f in dumped.glob("*final_bundles.txt") if "analysis" not in f.name]
        text = max(schedules, key=lambda file: file.stat().st_size).read_text()
        cycles[name] = call_cycles(schedule_of(text), kernel.rows, kernel.blocks)
        for file in dumped.iterdir():
            file.unlink()
    return cycles


def call_cycles(schedule: Schedule, rows: int, blocks: int) -> int:
    """Return the cycles of one call: `blocks` squared steps a row, of which those in the future skip the block.

    The two cores of a v4 or v5p chip share the rows; the others have one core per device."""
    start, block, end = schedule.parts
    own = schedule.steps // blocks**2
    assert schedule.steps % blocks**2 == 0, f"{schedule} for {blocks} x {blocks} blocks"
    assert rows in (own, 2 * own), f"{schedule} for {rows} rows of {blocks} x {blocks} blocks"
    return own * (blocks**2 * schedule.always + blocks * (start + end) + blocks * (blocks + 1) // 2 * block)


def schedule_of(bundles: str) -> Schedule:
    """Read a final schedule: one loop, whose steps skip their conditional parts by branches."""
    lines = bundles.split("\n")
    costs = [bool(_BUNDLE.match(line)) + sum(int(n) for n in _STALL.findall(line)) for line in lines]
    (start,) = [place for place, line in enumerate(lines) if re.match(r"^ *0x[0-9a-f]+ LB:", line)]
    regions, end = [], 0
    for place, line in enumerate(lines):
        if branch := _BRANCH.search(line):
            after = (n for n in range(place + 1, len(lines)) if re.search(rf"empty region {branch[1]}\b", lines[n]))
            target = next(after, None)
            if target is None:  # it goes back to the start of the loop
                end = place + 1 + _DELAY_SLOTS
            else:
                regions.append((place, target))
    # The widest only fills and drains the pipeline.
    widest = max(regions, key=lambda region: region[1] - region[0])
    parts = [
        sum(costs[first + 1 + _DELAY_SLOTS : last])
        for first, last in regions
        if widest[0] < first and last <= widest[1]
    ]
    (trips,) = re.findall(r"scmp\.ge\.s32\.totalorder [^,]*, (\d+) /\* loop exit test", bundles)
    return Schedule(int(trips) - 2, sum(costs[start:end]) - sum(parts), parts)
