"""Reads the text of a compiled XLA program: what the compiler expects it to cost, and what fills the memory.

Both are the compiler's opinion. Cycles are the `estimated_cycles` that it writes beside each instruction. They rank variants
of a program well, but do not predict time."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple

from gpt2xla.tpu_check.origins import origin_of

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_CALLEE = re.compile(r"(?:to_apply|calls|branch_computations=\{|true_computation|false_computation)=?%?([\w.\-]+)")


class Allocation(NamedTuple):
    bytes: int
    shape: str
    origin: str  # the module whose forward pass made it, or the operation


class Kernel(NamedTuple):
    """A call of a kernel, for which the compiler estimates no cycles. It states FLOPs and bytes itself."""

    key: str
    name: str
    text: str  # of the call
    flops: int
    bytes: int
    calls: int = 1


@dataclass
class Program:
    """The instructions of each computation, in the order in which they run."""

    computations: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    entry: str = ""
    roots: dict[str, str] = field(default_factory=dict)  # the instruction of each computation that is its result

    @classmethod
    def parse(cls, text: str) -> Program:
        program, current = cls(), ""
        for line in text.split("\n"):
            if not current:
                if header := _HEADER.match(line):
                    current = header[2]
                    program.computations[current] = []
                    program.entry = current if header[1] else program.entry
            elif line.startswith("}"):
                current = ""
            elif instruction := _INSTRUCTION.match(line):
                program.computations[current].append((instruction[2], instruction[3]))
                if instruction[1]:
                    program.roots[current] = instruction[2]
        return program

    def cycles(self) -> Counter[str]:
        """Return the estimated cycles by kind of instruction (matmul, vector, copy, other), loops times their trips."""
        total: Counter[str] = Counter()
        for rest, times in self._executed(self.entry, 1):
            if estimate := re.search(r'"estimated_cycles":"(\d+)"', rest):
                total[self._kind(rest)] += int(estimate[1]) * times
        return total

    def kernels(self) -> dict[str, Kernel]:
        """Return our kernels that are called, each with how often, by a key that `kernel_of` gives to a call."""
        found: dict[str, Kernel] = {}
        for rest, times in self._executed(self.entry, 1):
            if kernel := kernel_of(rest):
                earlier = found.get(kernel.key)
                found[kernel.key] = kernel._replace(calls=times + (earlier.calls if earlier else 0))
        return found

    def largest_at_peak(self) -> list[Allocation]:
        """Return the arrays in main memory, except arguments, when the entry computation holds most; the largest first."""
        owners: dict[str, list[str]] = {}  # value -> the buffers it stands for
        sizes: dict[str, Allocation] = {}
        first, last = {}, {}
        for place, (name, rest) in enumerate(self.computations[self.entry]):
            opcode, operands = opcode_of(rest), operands_of(rest)
            # The others of a tuple do not wait for this one.
            for operand in operands if opcode != "get-tuple-element" else ():
                for buffer in owners.get(operand, []):
                    last[buffer] = place
            if opcode == "get-tuple-element" and operands:
                index = int(re.search(r"index=(\d+)", rest)[1])  # type: ignore[index]
                leaves = owners.get(operands[0], [])
                owners[name] = leaves[index : index + 1]
            elif opcode in ("bitcast", "tuple", "copy-done", "slice-done", "optimization-barrier"):
                owners[name] = [buffer for operand in operands for buffer in owners.get(operand, [])]
            elif opcode in ("parameter", "constant", "after-all"):
                owners[name] = []
            else:
                operation = re.search(r'op_name="([^"]*)"', rest)
                origin = str(origin_of(operation[1])) if operation else name
                owners[name] = []
                arrays = list(arrays_of(rest, opcode))
                # A copy's second result is its source.
                for number, (bytes_, shape) in enumerate(arrays[:1] if opcode.endswith("-start") else arrays):
                    buffer = f"{name}.{number}"
                    owners[name].append(buffer)
                    sizes[buffer] = Allocation(bytes_, shape, origin)
                    first[buffer] = last[buffer] = place
        peak = _peak(first, last, sizes)
        live = [sizes[buffer] for buffer in sizes if first[buffer] <= peak <= last[buffer]]
        return sorted(live, key=lambda allocation: -allocation.bytes)

    def executed(self) -> Iterator[tuple[str, str, int]]:
        """Yield the computation and the name of each instruction that is executed, and how often."""
        yield from self._steps(self.entry, 1)

    def instruction(self, computation: str, name: str) -> str:
        """Return what follows the name of an instruction in the program's text."""
        return self._texts[computation][name]

    def caller(self, computation: str) -> tuple[str, str] | None:
        """Return the computation that calls this one, and the text of the call; None for the entry."""
        return self._callers.get(computation)

    def parameters(self, computation: str) -> dict[int, str]:
        """Return the names of a computation's parameters, by number."""
        found = ((name, re.search(r" parameter\((\d+)\)", text)) for name, text in self.computations[computation])
        return {int(number[1]): name for name, number in found if number}

    def users(self, computation: str, name: str) -> list[tuple[str, str]]:
        """Return the instructions of a computation that read one of its values."""
        return self._users[computation].get(name, [])

    @cached_property
    def _users(self) -> dict[str, dict[str, list[tuple[str, str]]]]:
        users: dict[str, dict[str, list[tuple[str, str]]]] = {}
        for computation, instructions in self.computations.items():
            of_names = users[computation] = {}
            for name, text in instructions:
                for operand in set(operands_of(text)):
                    of_names.setdefault(operand, []).append((name, text))
        return users

    @cached_property
    def _texts(self) -> dict[str, dict[str, str]]:
        return {computation: dict(instructions) for computation, instructions in self.computations.items()}

    @cached_property
    def _callers(self) -> dict[str, tuple[str, str]]:
        callee = re.compile(r"(?:calls|body|to_apply)=%?([\w.\-]+)")
        return {
            name: (computation, rest)
            for computation, instructions in self.computations.items()
            for _, rest in instructions
            for name in callee.findall(rest)
        }

    def _executed(self, computation: str, times: int) -> Iterator[tuple[str, int]]:
        for place, name, repeated in self._steps(computation, times):
            yield self.instruction(place, name), repeated

    def _steps(self, computation: str, times: int) -> Iterator[tuple[str, str, int]]:
        for name, rest in self.computations.get(computation, []):
            opcode = opcode_of(rest)
            if opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", rest)
                assert body
                yield from self._steps(body[1], times * self._trips(rest))
            elif opcode in ("call", "conditional"):
                for callee in _CALLEE.findall(rest):
                    yield from self._steps(callee, times)
            else:
                yield computation, name, times

    def _trips(self, rest: str) -> int:
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
            return int(known[1])
        # The loops that overlap products with communication count from 0 to the constant in their condition, in steps of
        # one or, where two rounds became one, of two.
        condition, body = (re.search(rf"{name}=%?([\w.\-]+)", rest) for name in ("condition", "body"))
        if not condition or not body:
            return 1
        tests = [text for _, text in self.computations.get(condition[1], [])]
        limit = max((int(n) for text in tests for n in re.findall(r"constant\((\d+)\)", text)), default=1)
        counter = next((int(n) for text in tests for n in re.findall(r"\), index=(\d+)", text)), None)
        if counter is None or body[1] not in self.roots:
            return limit
        result = self.instruction(body[1], self.roots[body[1]])
        following = operands_of(self.instruction(body[1], operands_of(result)[counter]))
        steps = (re.search(r"constant\((\d+)\)", self.instruction(body[1], operand)) for operand in following)
        return -(-limit // next((int(step[1]) for step in steps if step), 1))

    def _kind(self, rest: str) -> str:
        opcode = opcode_of(rest)
        if opcode == "fusion":
            callee = re.search(r"calls=%?([\w.\-]+)", rest)
            body = self.computations.get(callee[1], []) if callee else []
            return "matmul" if any(opcode_of(inner) in ("convolution", "dot") for _, inner in body) else "vector"
        if opcode in ("convolution", "dot"):
            return "matmul"
        return "copy" if opcode.startswith("copy") else "other"


def kernel_of(rest: str) -> Kernel | None:
    """Return the kernel that an instruction calls; None if it calls none."""
    if 'custom_call_target="tpu_custom_call"' not in rest:
        return None
    configuration = json.loads(rest[rest.index("backend_config=") + len("backend_config=") :])["custom_call_config"]
    name = re.search(rb"gpt2xla_(\w+)", base64.b64decode(configuration["body"]))
    cost = {key: int(value) for key, value in configuration["cost_estimate"].items()}
    key = hashlib.sha256(configuration["body"].encode()).hexdigest()[:12]
    return Kernel(key, name[1].decode() if name else "unnamed", rest, cost["flops"], cost["bytes_accessed"])


@cache  # asked for the same instructions again and again
def opcode_of(rest: str) -> str:
    found = re.search(r"(?:\}|\]|\)) ([a-z][a-z0-9\-]*)\(", rest)
    return found[1] if found else "?"


def op_name_of(rest: str) -> str:
    """Return the name that the traced graph gave an instruction; "" if it has none."""
    found = re.search(r'op_name="([^"]*)"', rest)
    return found[1] if found else ""


def called(rest: str) -> str:
    """Return the computation that a fusion computes."""
    found = re.search(r"calls=%?([\w.\-]+)", rest)
    assert found, rest
    return found[1]


@cache
def operands_of(rest: str) -> tuple[str, ...]:
    start = rest.find(opcode_of(rest) + "(")
    depth, end = 0, start
    for end in range(start, len(rest)):
        depth += (rest[end] == "(") - (rest[end] == ")")
        if depth == 0 and rest[end] == ")":
            break
    return tuple(re.findall(r"%([\w.\-]+)", rest[start:end]))


def arrays_of(rest: str, opcode: str, *, everywhere: bool = False) -> Iterator[tuple[int, str]]:
    """Yield bytes and shape of each array that an instruction makes; outside main memory it counts 0 bytes, unless
    `everywhere` counts."""
    for kind, sizes, layout in _ARRAY.findall(rest[: rest.find(f" {opcode}(")]):
        numbers = math.prod(int(size) for size in sizes.split(",") if size)
        bits = int(found[0]) if (found := re.search(r"\d+", kind)) else 8
        counts = everywhere or "S(" not in layout
        yield numbers * bits // 8 if counts else 0, f"{kind}[{sizes}]"


def _peak(first: dict[str, int], last: dict[str, int], sizes: dict[str, Allocation]) -> int:
    changes: Counter[int] = Counter()
    for buffer, allocation in sizes.items():
        changes[first[buffer]] += allocation.bytes
        changes[last[buffer] + 1] -= allocation.bytes
    held = most = peak = 0
    for place in sorted(changes):
        held += changes[place]
        if held > most:
            most, peak = held, place
    return peak
