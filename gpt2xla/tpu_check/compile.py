"""Compiles a traced step with libtpu. Run it as a program: `python -m gpt2xla.tpu_check.compile REQUEST.json`.

It needs no TPU: JAX's ahead-of-time topologies reach the same compiler that a TPU machine runs."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt2xla.runtime.xla.compiler_messages import compiler_figures, to_bytes
from gpt2xla.tpu_check.hlo import Allocation, Program
from gpt2xla.tpu_check.kernels import schedule_cycles
from gpt2xla.tpu_check.origins import origin_of
from gpt2xla.tpu_check.topologies import TOPOLOGIES, Topology
from gpt2xla.tpu_check.where import work_of

GIB = 2**30


def main(request: dict[str, Any]) -> None:
    """Answer `request` in a file.

    It holds topology and output (the file), and either graph (a file), replicas and spmd, or kernels and documents, as
    `kernels.schedule_cycles` takes them."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    topology = TOPOLOGIES[request["topology"]]
    if "kernels" in request:
        answer = schedule_cycles(topology, request["kernels"], request["documents"])
    else:
        answer = compile_graph(Path(request["graph"]).read_bytes(), topology, request["replicas"], request["spmd"])
    Path(request["output"]).write_text(json.dumps(answer))


def compile_graph(graph: bytes, topology: Topology, replicas: int, spmd: bool) -> dict[str, Any]:
    """Return what the compiler says about `graph`, an HloProto as XLA dumps it.

    Sizes are in GiB and of one device. Cycles leave out custom calls, for which the compiler has no estimate. `work` says
    what they do, as fields of `where.Work`."""
    import numpy as np
    from jax._src.lib import xla_client
    from jax.experimental import topologies

    description = topologies.get_topology_desc(platform="tpu", topology_name=topology.libtpu_name)
    devices: list[Any] = list(description.devices)[:replicas]
    numbers = np.array([device.id for device in devices])
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = (1, replicas) if spmd else (replicas, 1)
    options.device_assignment = xla_client.DeviceAssignment.create(numbers.reshape(options.num_replicas, -1))
    if spmd:
        build = options.executable_build_options
        build.use_spmd_partitioning = True
        build.num_replicas, build.num_partitions = 1, replicas
        build.allow_spmd_sharding_propagation_to_parameters = [True]
        build.allow_spmd_sharding_propagation_to_output = [True]
    module, donated = _to_stablehlo(graph)
    answer, program = compile_module(module, topology, devices, options)
    if program is None:
        return answer
    work = [asdict(group) for group in work_of(program)]
    kernels = {key: kernel._asdict() for key, kernel in program.kernels().items()}
    return answer | {"donated": donated, "kernels": kernels, "work": work}


def compile_module(
    module: bytes, topology: Topology, devices: list[Any], options: Any
) -> tuple[dict[str, Any], Program | None]:
    """Return what the compiler says about `module`, StableHLO, and the program that it makes of it, if that fits."""
    from jax._src.lib import xla_client

    start = time.perf_counter()
    try:
        program = devices[0].client.compile(module, xla_client.DeviceList(tuple(devices)), options)
    except Exception as error:
        refused = _does_not_fit(str(error))
        if refused is None:
            raise
        return refused | {"compile_seconds": round(time.perf_counter() - start, 1)}, None
    seconds = round(time.perf_counter() - start, 1)
    memory, costs = program.get_compiled_memory_stats(), program.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    hlo = Program.parse(program.hlo_modules()[0].to_string())
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    peak = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes + temporary
    cycles = hlo.cycles()
    answer = {
        "fits": True,
        "peak_gib": round(peak / GIB, 3),
        "alive_gib": round(memory.peak_memory_in_bytes / GIB, 3),  # without the gaps between arrays
        "memory_gib": topology.memory,
        "arguments_gib": round(arguments / GIB, 3),
        "temporary_gib": round(temporary / GIB, 3),
        "largest": _by_origin(hlo.largest_at_peak()),
        "flops": costs["flops"],
        "bytes": costs["bytes accessed"],
        "cycles": sum(cycles.values()),
        "cycles_by_kind": dict(cycles),
        "compile_seconds": seconds,
    }
    return answer, hlo


def _to_stablehlo(graph: bytes) -> tuple[bytes, int]:
    """Return the module as the compiler takes it, and how many of its arguments give their memory to results."""
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jaxlib.mlir import ir

    module = _module_of(graph)
    header = xla_client._xla.HloModule.from_serialized_hlo_module_proto(module).to_string().split("\n", 1)[0]
    start = header.find("buffer_donor")
    end = header.find("entry_computation_layout")
    donors = {int(n) for n in re.findall(r"\((\d+), \{", header[start:end])} if start >= 0 else set()
    with mlir.make_ir_context():
        parsed: Any = ir.Module.parse(xla_client._xla.mlir.hlo_to_stablehlo(module))
        (main,) = [op for op in parsed.body.operations if getattr(op, "name", None) and op.name.value == "main"]
        attributes = main.attributes["arg_attrs"] if "arg_attrs" in main.attributes else [{}] * len(main.arguments)
        marked = []
        for number, old in enumerate(attributes):
            new = {a.name: a.attr for a in old if a.name != "jax.buffer_donor"}
            if number in donors:
                new["jax.buffer_donor"] = ir.BoolAttr.get(True)
            marked.append(ir.DictAttr.get(new))
        main.attributes["arg_attrs"] = ir.ArrayAttr.get(marked)
        return mlir.module_to_bytecode(parsed), len(donors)


def _module_of(proto: bytes) -> bytes:
    """Return the HloModuleProto inside an HloProto, its first field: a tag, the size as a varint, and the contents."""
    assert proto[0] == 1 << 3 | 2, "no module in XLA's dump"
    start = next(place for place in range(1, len(proto)) if proto[place] < 128) + 1
    size = sum((byte & 127) << 7 * number for number, byte in enumerate(proto[1:start]))
    return proto[start : start + size]


def _does_not_fit(message: str) -> dict[str, Any] | None:
    """Return the report of a program that is too large, by the compiler's message, or None for any other message."""
    figures = compiler_figures(message)
    if figures is None:
        return None
    needed, memory = figures
    refused = {"fits": False, "peak_gib": needed / GIB, "memory_gib": memory / GIB}
    if shape := re.search(r"would exceed memory \(size=\d+\).*?shape = '([^{']*)", message):
        alone = {"gib": round(needed / GIB, 3), "count": 1, "shape": shape[1], "origin": "this array alone"}
        return refused | {"largest": [alone]}
    operator = r'(?:\s+Operator: (?:op_type="[^"]*" )?op_name="([^"]*)"[^\n]*\n)?'
    largest = [
        Allocation(to_bytes(size, unit), shape.split("{")[0], str(origin_of(name)) if name else "unnamed")
        for size, unit, name, shape in re.findall(rf"Size: ([\d.]+)([KMG])\n{operator}\s+Shape: (\S+)", message)
    ]
    return refused | {"largest": _by_origin(largest)}


def _by_origin(allocations: list[Allocation]) -> list[dict[str, Any]]:
    """Merge equal arrays of all layers into one entry each; return the eight largest."""
    groups: Counter[tuple[str, str]] = Counter()
    numbers: Counter[tuple[str, str]] = Counter()
    for allocation in allocations:
        key = (allocation.shape, re.sub(r"\bh\.\d+", "h.*", allocation.origin))
        groups[key] += allocation.bytes
        numbers[key] += 1
    return [
        {"gib": round(size / GIB, 3), "count": numbers[shape, origin], "shape": shape, "origin": origin}
        for (shape, origin), size in groups.most_common(8)
    ]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
