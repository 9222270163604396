"""What the peers' tracing programs share. They run in the peers' own environment: jax 0.7, no torch, none of our packages.

A peer's step is lowered for the devices of a topology, which needs no TPU, and what jax would give the compiler is
written instead: `tpu_peers.py` gives it to the same compiler as ours.
"""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "USE_TF": "0"}

VOCABULARY, LENGTH, SEQUENCES = 50304, 1024, 32  # sequences are per device


def arguments() -> tuple[Path, str, int, Path, list[str]]:
    """Return the peer's checkout, libtpu's name of the topology, devices, the folder to write to, and options."""
    checkout, topology, number, folder, *options = sys.argv[1:]
    sys.path.insert(0, str(Path(checkout, "src")))
    return Path(checkout), topology, int(number), Path(folder), options


def devices_of(topology: str, number: int) -> list[Any]:
    from jax._src import tpu_custom_call
    from jax.experimental import topologies

    # The newest Mosaic that libtpu 0.0.21 reads; jax would ask a TPU, which is not there.
    tpu_custom_call.get_ir_version = lambda *_: 7
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)[:number]


def write(lowered: Any, folder: Path) -> NoReturn:
    """Write `step.mlir`, the program, and `options`, both as jax gives them to the compiler; then exit."""
    from jax._src import compiler
    from jax._src.interpreters import mlir

    def catch(_backend: Any, module: Any, _devices: Any, options: Any, *_: Any) -> NoReturn:
        (folder / "step.mlir").write_bytes(mlir.module_to_bytecode(module))
        (folder / "options").write_bytes(options.SerializeAsString())
        sys.stdout.flush()
        os._exit(0)  # some of a peer's threads would keep the process alive

    compiler.compile_or_get_cached = catch
    lowered.compile()
    raise AssertionError("jax compiled the step by another way")
