"""What our kernels cost. The compiler estimates nothing for them: each is compiled by itself, and its schedule counted."""

from __future__ import annotations

import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from gpt2xla.tpu_check.topologies import Topology


def schedule_cycles(
    topology: Topology, kernels: dict[str, dict[str, Any]], documents: list[int] | None
) -> dict[str, int]:
    """Return, by the keys of `kernels`, the cycles of one call: the bundles of its final schedule, one a cycle, and its
    stalls, times the steps of its grid.

    Each of `kernels` has a `name`, and the `text` of a call in the compiled program. `documents` are the sizes (B, T, H, K)
    of attention, if it stays within documents: then its cycles are those of documents as long as the sequence. Shorter ones
    take fewer."""
    cycles = {}
    with tempfile.TemporaryDirectory() as folder:
        flags = os.environ.get("LIBTPU_INIT_ARGS", "")
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        from jax._src.lib import xla_client
        from jax.experimental import topologies

        device: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology.libtpu_name).devices[0]
        for key, kernel in kernels.items():
            longest = documents is not None and kernel["name"].startswith("attention")
            module = _of_one_document(topology, kernel["name"], documents) if longest else _alone(kernel["text"])
            device.client.compile(module, xla_client.DeviceList((device,)), xla_client.CompileOptions())
            cycles[key] = _counted(Path(folder))
    return cycles


def _counted(folder: Path) -> int:
    # Two programs are dumped: the kernel's and a frame around it, the shorter one.
    schedules = [file for file in folder.glob("*final_bundles.txt") if "analysis" not in file.name]
    kernel = max(schedules, key=lambda file: file.stat().st_size).read_text()
    for file in folder.iterdir():
        file.unlink()
    bundles = len(re.findall(r"^ *(?:0x[0-9a-f]+|0) .*?: .*\{", kernel, re.MULTILINE))
    stalls = sum(int(n) for n in re.findall(r"vdelay (\d+)", kernel))
    grid = re.search(r"iteration_bounds: \(([\d, ]+)\)", kernel)
    assert grid, "a kernel's schedule names its grid"
    return (bundles + stalls) * math.prod(int(n) for n in grid[1].split(",") if n.strip())


def _of_one_document(topology: Topology, name: str, sizes: Any) -> bytes:
    import jax
    from jax._src.interpreters import mlir

    from gpt2xla.model import pallas_attention
    from gpt2xla.model.pallas_attention_shape import Shape
    from gpt2xla.model.pallas_lowering import use_libtpu_version

    use_libtpu_version()
    B, T, H, K = sizes
    shape = Shape(B, T, H, K, topology.kind, documents=True, skips=False)
    kernel = getattr(pallas_attention, name.removeprefix("attention_"))(shape)
    lowered = jax.jit(kernel).trace(*kernel.arguments).lower(lowering_platforms=("tpu",))
    module: Any = lowered.compiler_ir()
    return mlir.module_to_bytecode(module)


def _alone(text: str) -> bytes:
    """Return a module that does nothing but a call, given as in a compiled program."""
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir

    operands = _layouts(text[text.index("operand_layout_constraints=") :].split("}}")[0])
    results = _layouts(text[: text.index(" custom-call(")])
    configuration = text[text.index("backend_config=") + len("backend_config=") :]
    arguments = ", ".join(f"%{number}: {kind}" for number, (kind, _) in enumerate(operands))
    types = ", ".join(kind for kind, _ in results)
    one = len(results) == 1
    returned = "%r" if one else ", ".join(f"%r#{number}" for number in range(len(results)))
    module = f"""
        func.func public @main({arguments}) -> ({types}) {{
          %r{"" if one else f":{len(results)}"} = stablehlo.custom_call @tpu_custom_call(
            {", ".join(f"%{number}" for number in range(len(operands)))}) {{
            backend_config = {_quoted(configuration)},
            operand_layouts = [{", ".join(layout for _, layout in operands)}],
            result_layouts = [{", ".join(layout for _, layout in results)}]
          }} : ({", ".join(kind for kind, _ in operands)}) -> {types if one else f"({types})"}
          return {returned} : {types}
        }}"""
    with mlir.make_ir_context():
        parsed: Any = ir.Module.parse(module)
        return mlir.module_to_bytecode(parsed)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\5C").replace('"', "\\22") + '"'


def _layouts(text: str) -> list[tuple[str, str]]:
    """Return types and row-major layouts, in MLIR's words, of arrays in XLA's."""
    found = []
    for kind, sizes in re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]\{", text):
        shape = [size for size in sizes.split(",") if size]
        order = ", ".join(str(number) for number in reversed(range(len(shape))))
        kind = kind.replace("s32", "i32").replace("u32", "ui32")
        found.append((f"tensor<{'x'.join([*shape, kind])}>", f"dense<[{order}]> : tensor<{len(shape)}xindex>"))
    return found
