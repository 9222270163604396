"""How many bytes an instruction of a compiled XLA program moves between main memory and the core."""

from __future__ import annotations

from gpt2xla.tpu_check.hlo import Program, arrays_of, called, opcode_of, operands_of

_PIECES = ("dynamic-slice", "gather", "slice")


def moved_bytes(program: Program, computation: str, rest: str) -> int:
    """Return the bytes of an instruction's operands and results in main memory, each read or written once.

    Of what it only reads a piece of, or writes in place, the piece counts."""
    operands = [program.instruction(computation, operand) for operand in operands_of(rest)]
    if opcode_of(rest) != "fusion":
        return _in_main_memory(rest) + sum(map(_in_main_memory, set(operands)))
    callee = called(rest)
    inside = program.parameters(callee)
    read = sum(min(_in_main_memory(text), _read(program, callee, inside[n])) for n, text in enumerate(operands))
    root = program.instruction(callee, program.roots[callee])
    parts = [program.instruction(callee, part) for part in operands_of(root)] if opcode_of(root) == "tuple" else [root]
    results = [size for size, _ in arrays_of(rest, "fusion")]
    if len(parts) != len(results):
        return read + sum(results)
    return read + sum(min(size, _written(program, callee, part)) for size, part in zip(results, parts, strict=True))


def _in_main_memory(text: str) -> int:
    return sum(size for size, _ in arrays_of(text, opcode_of(text)))


def _whole(text: str) -> int:
    return sum(size for size, _ in arrays_of(text, opcode_of(text), everywhere=True))


def _read(program: Program, computation: str, name: str, *, inner: bool = False) -> int:
    """Return how many bytes of a value its users read. The result of an `inner` computation has users outside, too."""
    whole = _whole(program.instruction(computation, name))
    if inner and name == program.roots[computation]:
        return whole
    total = 0
    for user, text in program.users(computation, name):
        opcode, operands = opcode_of(text), operands_of(text)
        if opcode in _PIECES:
            total += _whole(text)
        elif opcode == "bitcast":
            total += _read(program, computation, user, inner=inner)
        elif opcode == "fusion":
            callee = called(text)
            inside = program.parameters(callee)
            places = [number for number, operand in enumerate(operands) if operand == name]
            total += sum(_read(program, callee, inside[number], inner=True) for number in places)
        elif opcode != "tuple" and (opcode != "dynamic-update-slice" or name in operands[1:]):
            return whole
    return min(total, whole)


def _written(program: Program, computation: str, text: str) -> int:
    opcode = opcode_of(text)
    if opcode == "parameter":
        return 0
    if opcode == "bitcast":
        return _written(program, computation, program.instruction(computation, operands_of(text)[0]))
    if opcode == "dynamic-update-slice":
        return _whole(program.instruction(computation, operands_of(text)[1]))
    return _whole(text)
