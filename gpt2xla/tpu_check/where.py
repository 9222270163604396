"""Where a step's cycles go: the parts of a training step, and its largest instructions by the model's names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpt2xla.tpu_check.hlo import Program, arrays_of, called, kernel_of, op_name_of, opcode_of
from gpt2xla.tpu_check.origins import Origin, origin_of
from gpt2xla.tpu_check.products import Product, products
from gpt2xla.tpu_check.topologies import Topology
from gpt2xla.tpu_check.traffic import moved_bytes

KERNELS = "attention kernels"
LOOPS = "loops around products"  # in which they overlap with collectives: what puts the pieces together
PARTS = (  # in the order of a step
    "embedding and its gradient",
    "layer norm forward, residual",
    "qkv/proj products forward",
    KERNELS,
    "attention products",
    "attention passes",
    "MLP products forward",
    "MLP passes",
    "loss head products",
    "loss head passes",
    "layer norm backward, residual gradient",
    "MLP products backward dx",
    "MLP products dW",
    "qkv/proj products backward dx",
    "qkv/proj products dW",
    "bias gradients",
    "collectives",
    "gradient norm",
    "optimizer",
    LOOPS,
    "copies and casts",
    "rest",
)
_KERNELS = {  # by their names: the part, and what is computed
    "attention_forward": (KERNELS, "h.*.attn forward"),
    "attention_backward": (KERNELS, "h.*.attn backward"),
    "project": ("qkv/proj products forward", "h.*.attn.c_attn forward"),
    "expand": ("MLP products forward", "h.*.mlp.c_fc forward"),
    "add_and_normalise": ("qkv/proj products forward", "h.*.attn.c_proj forward, residual, layer norm"),
    "add_and_normalise_activated": ("MLP products forward", "h.*.mlp.c_proj forward, activation, residual, layer norm"),
    "differentiate_activation": ("MLP products backward dx", "h.*.mlp.c_proj backward dx, activation"),
    "differentiate_norm": ("MLP products backward dx", "h.*.mlp.c_fc backward dx, layer norm, residual"),
    "differentiate_projections": ("qkv/proj products backward dx", "h.*.attn.c_attn backward dx, layer norm, residual"),
}
_LARGEST = 25
_COLLECTIVES = ("all-", "collective-", "reduce-scatter", "ragged-all-to-all")
_MOVES = {
    "bitcast", "broadcast", "concatenate", "convert", "copy", "dynamic-slice", "dynamic-update-slice", "pad", "reshape",
    "select", "slice", "transpose",
}  # fmt: skip
_NO_WORK = {"bitcast", "broadcast", "constant", "get-tuple-element", "iota", "parameter", "tuple"}


@dataclass
class Work:
    """Instructions that do the same, in each layer or piece. Sums over all of them and over how often they run."""

    part: str
    name: str  # of the module, and what is computed of it
    shapes: str
    cycles: int = 0  # by the compiler's estimate; it has none for kernels, for which `summary` adds them
    flops: int = 0  # of products
    bytes: int = 0  # of operands and results in main memory
    unknown: int = 0  # bytes of what the compiler does not estimate: what collectives give, what is looked up by index
    instructions: int = 0
    kernel: str = ""  # the key of the kernel that they call


def work_of(program: Program) -> list[Work]:
    """Return what `program` does, without instructions that are free. Their cycles are all its cycles."""
    groups: dict[tuple[str, str, str], Work] = {}
    for computation, name, times in program.executed():
        one = _work(program, computation, program.instruction(computation, name))
        if one:
            one.name = re.sub(r"\bh\.\d+", "h.*", one.name)
            key = one.part, one.name, one.shapes
            group = groups.setdefault(key, Work(*key, kernel=one.kernel))
            group.cycles += one.cycles * times
            group.flops += one.flops * times
            group.bytes += one.bytes * times
            group.unknown += one.unknown * times
            group.instructions += times
    return list(groups.values())


def summary(work: list[Work], kernels: dict[str, int], topology: Topology) -> dict[str, Any]:
    """Return the report: `parts` and the `largest` groups of instructions, most cycles first, and their sums.

    `kernels` holds the cycles of one call of each kernel. `bound` is how many cycles the products would take if
    the matrix units never waited."""
    for group in work:
        if group.kernel:
            group.cycles = kernels[group.kernel] * group.instructions
    total = sum(group.cycles for group in work)

    def row(groups: list[Work]) -> dict[str, Any]:
        cycles = sum(group.cycles for group in groups)
        return {
            "cycles": cycles,
            "share": round(cycles / total, 4),
            "bound": round(sum(group.flops for group in groups) / topology.flops_per_cycle),
            "bytes": sum(group.bytes for group in groups),
            "unknown_bytes": sum(group.unknown for group in groups),
            "instructions": sum(group.instructions for group in groups),
        }

    assert {group.part for group in work} <= set(PARTS)
    by_part = {part: [group for group in work if group.part == part] for part in PARTS}
    parts = [{"part": part, **row(groups)} for part, groups in by_part.items() if groups]
    largest = sorted(work, key=lambda group: (-group.cycles, -group.bytes))[:_LARGEST]
    sums = row(work)
    return {
        "flops_per_cycle": topology.flops_per_cycle,
        "cycles": total,
        "bound": sums["bound"],
        "parts": sorted(parts, key=lambda part: (-part["cycles"], -part["bytes"])),
        "largest": [{"name": group.name, "shapes": group.shapes, **row([group])} for group in largest],
        "kernels": sum(group.cycles for group in work if group.kernel),
    }


def described(where: dict[str, Any]) -> str:
    """Return a report as lines to read."""
    width = max(len(part["part"]) for part in where["parts"])
    rate = where["flops_per_cycle"]
    lines = [f"  where the cycles go, in millions (bound: the products alone, at {rate:,} FLOP per cycle):"]
    for part in where["parts"]:
        unknown = f", {part['unknown_bytes'] / 1e9:.2f} GB without estimate" if part["unknown_bytes"] >= 1e7 else ""
        lines.append(
            f"    {part['part']:{width}} {part['cycles'] / 1e6:8.2f} {part['share']:6.1%}  "
            f"bound {part['bound'] / 1e6:8.2f}  x{part['instructions']}{unknown}"
        )
    lines.append(
        f"    {'total':{width}} {where['cycles'] / 1e6:8.2f} {1:6.1%}  bound {where['bound'] / 1e6:8.2f}: "
        f"{where['bound'] / where['cycles']:.0%} of the cycles at the full matrix rate"
    )
    if kernels := where["kernels"]:
        lines.append(
            f"    of these {kernels / 1e6:.2f} in our kernels: of each the most of its final schedule with stalls, its "
            "products alone, and its traffic at the full rate of memory"
        )
    lines.append("  the largest instructions: millions of cycles, bound, GB of main memory, how many:")
    for group in where["largest"]:
        lines.append(
            f"    {group['cycles'] / 1e6:7.2f} {group['bound'] / 1e6:7.2f} {group['bytes'] / 1e9:6.2f} "
            f"x{group['instructions']:<4} {group['name']}  {group['shapes']}"
        )
    return "\n".join(lines)


def _work(program: Program, computation: str, rest: str) -> Work | None:
    opcode = opcode_of(rest)
    cycles = int(found[1]) if (found := re.search(r'"estimated_cycles":"(\d+)"', rest)) else None
    origin = origin_of(op_name_of(rest) or opcode)
    moved = moved_bytes(program, computation, rest)
    if kernel := kernel_of(rest):
        part, name = _KERNELS.get(kernel.name, ("rest", kernel.name))
        return Work(part, f"{name} (kernel)", _result(rest), 0, kernel.flops, moved, kernel=kernel.key)
    inside = list(_operations(program, rest))
    multiplied = list(products(program, computation, rest))
    if not multiplied and any(inner.startswith(_COLLECTIVES) for inner, _ in inside):
        if opcode.endswith("-done"):
            return None
        given = sum(size for size, shape in arrays_of(rest, opcode, everywhere=True) if shape != "u32[]")
        if opcode.endswith("-start"):  # whose other half is the operands
            given //= 2
        return Work("collectives", opcode.removesuffix("-start"), _result(rest), cycles or 0, 0, moved, given)
    if cycles is None and opcode != "fusion":
        return None
    unknown = moved if cycles is None else 0
    if multiplied:
        largest = max(multiplied, key=lambda product: product.flops)
        part, name = _product_part(largest)
        flops = sum(product.flops for product in multiplied)
        return Work(part, name, largest.shapes, cycles or 0, flops, moved, unknown)
    place = origin.module if origin.module == "optimizer" else f"{origin.module} {origin.direction}"
    name = f"{place} ({origin.operations[0]})" if origin.module else origin.operations[0]
    part = _pass_part(inside, origin)
    if computation != program.entry and part in ("copies and casts", "rest"):
        part = LOOPS
    return Work(part, name, _result(rest), cycles or 0, 0, moved, unknown)


def _product_part(product: Product) -> tuple[str, str]:
    """Return the part of a product, and its name."""
    origin = origin_of(product.op_name)
    module, direction, _ = origin
    if not module or module == "optimizer":
        return _part_of(origin), str(origin)
    if module == "loss":  # which computes its gradient together with its logits
        return "loss head products", module
    if module.endswith(".attention"):
        return "attention products", f"{module} {direction}"
    if direction == "backward":
        direction = "backward dx" if product.reads_weight else "dW"
    name = f"{module} {direction}"
    kind = next((kind for key, kind in ((".mlp", "MLP"), (".attn", "qkv/proj")) if key in module), None)
    return f"{kind} products {direction.removesuffix(' again')}" if kind else _part_of(origin), name


def _pass_part(inside: list[tuple[str, Origin]], own: Origin) -> str:
    """Return the part to which most of the operations of an instruction without products belong; of equal ones, the part of
    the operation that names the instruction."""
    if all(opcode in _MOVES for opcode, _ in inside):
        return "copies and casts"
    votes = Counter(_part_of(origin) for _, origin in inside)
    most = max(votes.values(), default=0)
    first = _part_of(own)
    return first if votes[first] == most else next(part for part in votes if votes[part] == most)


def _part_of(origin: Origin) -> str:
    """Return the part of an operation that is no product."""
    module, direction, operations = origin
    if module == "optimizer":
        return "gradient norm" if any("norm" in name for name in operations) else "optimizer"
    if module == "loss":
        return "loss head passes"
    if module.endswith(".attention"):
        return "attention passes"
    last = module.rsplit(".", 1)[-1]
    if last.startswith("ln_") or re.fullmatch(r"h\.\d+", module):
        return "layer norm backward, residual gradient" if direction == "backward" else "layer norm forward, residual"
    # Autograd adds the gradients of a tensor that is read twice; under checkpointing, inside the model's backward pass.
    if operations[0] == "add" and (module, direction) in (("", ""), ("model", "backward")):
        return "layer norm backward, residual gradient"
    if last in ("wte", "wpe", "drop", "model"):
        return "embedding and its gradient"
    if direction == "backward" and operations[0] == "sum":
        return "bias gradients"
    return "MLP passes" if ".mlp" in module else "rest"


def _operations(program: Program, rest: str) -> Iterator[tuple[str, Origin]]:
    """Yield opcode and origin of what an instruction computes, itself or in what it fuses."""
    opcode = opcode_of(rest)
    if opcode == "fusion":
        for _, inner in program.computations[called(rest)]:
            yield from _operations(program, inner)
    elif opcode not in _NO_WORK:
        yield opcode, origin_of(op_name_of(rest) or opcode)


def _result(rest: str) -> str:
    """Return the shapes of an instruction's results: `bf16[768], 2 x f32[32,1024]`."""
    shapes = Counter(shape for _, shape in arrays_of(rest, opcode_of(rest)))
    return ", ".join(f"{number} x {shape}" if number > 1 else shape for shape, number in shapes.items())
