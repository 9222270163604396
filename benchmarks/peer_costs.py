"""How often a peer's compiled step does what the compiler counts once: JAX's trainers loop over their layers.

The compiler's own FLOPs and bytes are scaled by what this count gives with loops times their trips, over what it gives
with each instruction once, so that most of its own error cancels. Bytes are counted as the compiler does: operands and
results in any memory, of slices only these (`gpt2xla.tpu_check.traffic` counts main memory alone).
"""

from gpt2xla.tpu_check.hlo import Program, arrays_of, called, opcode_of, operands_of
from gpt2xla.tpu_check.products import products

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id", "replica-id",
    "optimization-barrier",
}  # fmt: skip
_STARTS = (
    "copy-start",
    "slice-start",
    "all-reduce-start",
)  # of the other ones, what runs is counted by the computation


def loops_over_once(program: Program) -> tuple[float, float]:
    """Return how many times the FLOPs of products and the bytes of a step are those that each instruction has once."""
    flops, moved = [0, 0], [0, 0]
    for computation, name, times in program.executed():
        rest = program.instruction(computation, name)
        number = sum(product.flops for product in products(program, computation, rest))
        size = bytes_accessed(program, computation, rest)
        flops = [flops[0] + number * times, flops[1] + number]
        moved = [moved[0] + size * times, moved[1] + size]
    return flops[0] / max(flops[1], 1), moved[0] / max(moved[1], 1)


def bytes_accessed(program: Program, computation: str, rest: str) -> int:
    """Return the bytes that an instruction reads and writes: operands and results, of slices only what is used."""
    opcode = opcode_of(rest)
    operands = [program.instruction(computation, operand) for operand in operands_of(rest)]
    if opcode in _FREE or opcode.endswith("-done") or (opcode.endswith("-start") and opcode not in _STARTS):
        return 0
    if opcode == "fusion":
        return _read(program, called(rest), operands) + _written(program, called(rest), rest)
    if opcode in ("dynamic-slice", "slice"):
        return 2 * _size(rest)
    if opcode == "dynamic-update-slice":
        return 2 * _size(operands[1])
    if opcode in ("copy-start", "slice-start"):
        sizes = [size for size, _ in arrays_of(rest, opcode, everywhere=True)]
        return 2 * sizes[opcode == "slice-start"]
    if '"ConcatBitcast"' in rest:
        return 0
    return _size(rest) + sum(_size(operand) for operand in operands)


def _read(program: Program, fusion: str, operands: list[str]) -> int:
    """Return the bytes that a fusion reads: of an operand of which it only takes slices, those."""
    total = 0
    for number, name in program.parameters(fusion).items():
        users = program.users(fusion, name)
        taken = [_taken(name, user) for _, user in users]
        whole = not users or None in taken
        total += _size(operands[number]) if whole else sum(size for size in taken if size)
    return total


def _taken(name: str, user: str) -> int | None:
    """Return the bytes of `name` that an instruction reads, if these are not all."""
    if opcode_of(user) in ("dynamic-slice", "slice"):
        return _size(user)
    updated = opcode_of(user) == "dynamic-update-slice" and operands_of(user)[0] == name
    return 0 if updated else None


def _written(program: Program, fusion: str, rest: str) -> int:
    """Return the bytes of a fusion's results; of an array that it updates in place, those of the slice."""
    total = _size(rest)
    for _, inner in program.computations[fusion]:
        if opcode_of(inner) == "dynamic-update-slice" and _size(inner) <= total:
            total += _size(program.instruction(fusion, operands_of(inner)[1])) - _size(inner)
    return total


def _size(rest: str) -> int:
    return sum(size for size, _ in arrays_of(rest, opcode_of(rest), everywhere=True))
