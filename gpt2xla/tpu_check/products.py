"""Matrix products in a compiled XLA program, where most of them are convolutions: what they cost, and what is a weight."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from gpt2xla.tpu_check.hlo import Program, called, op_name_of, opcode_of, operands_of

# What a weight goes through before a product reads it: other types, layouts, places and pieces of the same numbers.
_SAME_NUMBERS = {
    "all-gather", "all-gather-done", "all-gather-start", "async-done", "async-start", "bitcast", "collective-permute",
    "collective-permute-done", "collective-permute-start", "concatenate", "convert", "copy", "copy-done", "copy-start",
    "dynamic-slice", "dynamic-update-slice", "maximum", "optimization-barrier", "pad", "reshape", "select",
    "slice", "slice-done", "slice-start", "transpose",
}  # fmt: skip
_SHAPE = re.compile(r"^\(?[a-z]+\d*[a-z0-9]*\[([\d,]*)\]")
_FLOAT = re.compile(r"^(?:bf16|f16|f32)\[")


class Product(NamedTuple):
    op_name: str
    flops: int
    shapes: str  # result = first operand * second operand
    reads_weight: bool  # whether an operand is an argument of the program, such as a weight


def products(program: Program, computation: str, rest: str) -> Iterator[Product]:
    """Yield the products that an instruction of a computation computes, itself or in what it fuses."""
    opcode = opcode_of(rest)
    if opcode == "fusion":
        callee = called(rest)
        for _, inner in program.computations[callee]:
            yield from products(program, callee, inner)
    elif opcode in ("convolution", "dot"):
        operands = operands_of(rest)
        left, right = (_sizes(program.instruction(computation, operand)) for operand in operands)
        flops = _convolution_flops(rest, left, right) if opcode == "convolution" else _dot_flops(rest, left)
        reads_weight = any(_is_argument(program, computation, operand) for operand in operands)
        kind = rest[: rest.index("[")]
        shapes = f"{kind}{_shown(_sizes(rest))} = {_shown(left)} * {_shown(right)}"
        yield Product(op_name_of(rest), flops, shapes, reads_weight)


def _shown(sizes: tuple[int, ...]) -> str:
    return f"[{','.join(str(size) for size in sizes if size > 1)}]"


def _sizes(rest: str) -> tuple[int, ...]:
    found = _SHAPE.match(rest)
    assert found, rest
    return tuple(int(size) for size in found[1].split(",") if size)


def _dot_flops(rest: str, left: tuple[int, ...]) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    numbers = [int(n) for n in contracted[1].split(",") if n] if contracted else []
    return 2 * math.prod(_sizes(rest)) * math.prod(left[n] for n in numbers)


def _convolution_flops(rest: str, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Return 2 per multiplication with a number, leaving out those with padding: a product of batches is a convolution whose
    windows each meet one matrix, and otherwise padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    assert labels, rest
    result = _sizes(rest)
    flops = 2 * result[labels[3].index("b")] * result[labels[3].index("f")] * right[labels[2].index("i")]
    window = found[1] if (found := re.search(r"window=\{([^}]*)\}", rest)) else ""
    for place in range(len(result) - 2):
        number = str(place)
        sizes = (left[labels[1].index(number)], right[labels[2].index(number)], result[labels[3].index(number)])
        low = int(_window(window, "pad", place, "0_0").split("_")[0])
        strides = (int(_window(window, key, place, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        flops *= _meetings(*sizes, low, *strides)
    return flops


def _window(window: str, key: str, place: int, default: str) -> str:
    found = re.search(rf"\b{key}=(\S+)", window)
    return found[1].split("x")[place] if found else default


@functools.cache
def _meetings(
    left: int, right: int, result: int, low: int, stride: int, left_dilation: int, right_dilation: int
) -> int:
    """Return how often, along one dimension, a number of a window meets a number, over all places of the window."""
    positions = (r * stride + w * right_dilation - low for r in range(result) for w in range(right))
    return sum(0 <= p <= (left - 1) * left_dilation and p % left_dilation == 0 for p in positions)


def _is_argument(program: Program, computation: str, name: str, index: int | None = None) -> bool:
    """Return whether a value, or one of a tuple's, holds numbers of one of the program's arguments."""
    rest = program.instruction(computation, name)
    opcode, operands = opcode_of(rest), operands_of(rest)
    if opcode == "parameter":
        if computation == program.entry:
            return bool(_FLOAT.match(rest))
        site = program.caller(computation)
        if site is None:
            return False
        caller, call = site
        number = int(rest[rest.index("parameter(") :].split("(")[1].split(")")[0])
        outer = operands_of(call)
        return number < len(outer) and _is_argument(program, caller, outer[number], index)
    if opcode == "get-tuple-element":
        found = re.search(r"index=(\d+)", rest)
        assert found
        return _is_argument(program, computation, operands[0], int(found[1]))
    if opcode == "tuple":
        return index is not None and _is_argument(program, computation, operands[index])
    if opcode == "fusion":
        callee = called(rest)
        return _is_argument(program, callee, program.roots[callee], index)
    if opcode == "while":
        return _is_argument(program, computation, operands[0], index)
    # Other custom calls than our kernels are the compiler's own, which join pieces and wait for collectives.
    same = opcode in _SAME_NUMBERS or (opcode == "custom-call" and '"tpu_custom_call"' not in rest)
    return same and any(_is_argument(program, computation, operand, index) for operand in operands)
