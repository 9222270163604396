"""The training steps of JAX's trainers, by the same compiler as ours: rows for `tpu_table.py`.

A peer's own Python lowers its step (`peer_maxtext.py`, `peer_levanter.py`). Our libtpu compiles it, and counts cycles,
memory, bytes and kernels as it does for ours. Run as a program, with a request as JSON, it is one of these compilations.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import peer_costs
import peer_kernels

from gpt2xla.errors import InputError, RunFailed, in_one_line
from gpt2xla.tpu_check.topologies import TOPOLOGIES, Topology

HERE = Path(__file__).parent
SEQUENCES = 32  # per device, as in peer_lowering.py
# What a machine with devices sets for its own runs. LIBTPU_INIT_ARGS stays: it reaches all compilers.
SKIPPED_VARIABLES = ("PJRT_DEVICE", "TPU_", "XLA_", "CPU_NUM", "JAX_")
MAXTEXT = {
    "MaxText, layers unrolled, minimal_with_context": ["scan_layers=false", "remat_policy=minimal_with_context"],
    "MaxText, its defaults: scanned, full remat": [],
}
LEVANTER: dict[str, list[str]] = {"Levanter, data parallel": []}
STEPS = [*MAXTEXT, *LEVANTER]


class Peer(NamedTuple):
    program: str
    checkout: Path
    steps: dict[str, list[str]]  # a row's name, and the program's options


def peers_of(maxtext: Path | None, levanter: Path | None, python: Path | None) -> list[Peer]:
    """Return the peers whose checkouts are given. Raises InputError if one, or their Python, is not what it must be."""
    peers = []
    if maxtext:
        _require(maxtext, "src/MaxText/train_compile.py", "--maxtext", "AI-Hypercomputer/maxtext of September 2025")
        peers.append(Peer("peer_maxtext.py", maxtext, MAXTEXT))
    if levanter:
        _require(levanter, "src/levanter/trainer.py", "--levanter", "stanford-crfm/levanter")
        peers.append(Peer("peer_levanter.py", levanter, LEVANTER))
    if peers and python is None:
        raise InputError("--maxtext and --levanter need --peers-python: the Python that has their packages")
    if peers and python and not os.access(python, os.X_OK):
        raise InputError(f"--peers-python {python}: no such program; name bin/python of the peers' environment")
    return peers


def _require(checkout: Path, file: str, flag: str, what: str) -> None:
    if not (checkout / file).is_file():
        raise InputError(f"{flag} {checkout}: no {file} there; name a checkout of {what}")


def row(peer: Peer, python: Path, topology: str, step: str) -> dict[str, Any]:
    """Return the row of a step of `peer`, as `gpt2xla.tpu_check.check.check` reports ours, with two more keys.

    `counted_by_us` says that flops and bytes are estimates; `refused`, where a step does not compile, what the compiler
    said. Raises RunFailed if the step cannot be lowered, or the compiler is killed."""
    with tempfile.TemporaryDirectory() as folder:
        row = {"topology": topology, "step": step, "sequences_per_device": SEQUENCES}
        return row | _row(peer, python, topology, peer.steps[step], Path(folder))


def _row(peer: Peer, python: Path, topology: str, options: list[str], folder: Path) -> dict[str, Any]:
    where = [str(peer.checkout.resolve()), TOPOLOGIES[topology].libtpu_name, str(TOPOLOGIES[topology].devices)]
    command = [str(python.absolute()), "-E", str(HERE / peer.program), *where, str(folder), *options]
    _run(command, folder, f"{peer.program} with {peer.checkout}")
    row = _compiled(topology, folder, "step")
    calls = row.pop("kernel_calls", {})
    each = _compiled(topology, folder, "kernels") if calls else {}
    if calls and "refused" not in each:
        row["kernel_cycles"] = sum(each[name] * number for name, number in calls.items())
        row["cycles"] += row["kernel_cycles"]
    return row


def _compiled(topology: str, folder: Path, what: str) -> dict[str, Any]:
    request = {"topology": topology, "folder": str(folder)}
    _run([sys.executable, __file__, what, json.dumps(request)], Path.cwd(), f"compiling the {what} for {topology}")
    answer: dict[str, Any] = json.loads((folder / f"{what}.json").read_text())
    return answer


def _run(command: list[str], folder: Path, what: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SKIPPED_VARIABLES)}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode in (-9, 137):
        raise RunFailed(f"{what} was killed, most likely because memory ran out; give it a machine with more")
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RunFailed(f"{what} ended with exit code {done.returncode}: {last}")


def main(what: str, request: dict[str, str]) -> None:
    """Compile the step that a peer lowered, or its kernels alone, and write what the compiler says."""
    from jax.errors import JaxRuntimeError

    folder, topology = Path(request["folder"]), TOPOLOGIES[request["topology"]]
    try:
        answer = (compiled_step if what == "step" else compiled_kernels)(folder, topology)
    except JaxRuntimeError as error:
        answer = {"fits": False, "refused": in_one_line(error), "memory_gib": topology.memory}
    (folder / f"{what}.json").write_text(json.dumps(answer))


def compiled_step(folder: Path, topology: Topology) -> dict[str, Any]:
    from jax._src.lib import xla_client
    from jax.experimental import topologies

    from gpt2xla.tpu_check.compile import compile_module

    devices: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology.libtpu_name).devices
    options = xla_client.CompileOptions.ParseFromString((folder / "options").read_bytes())
    module = (folder / "step.mlir").read_bytes()
    answer, program = compile_module(module, topology, list(devices)[: topology.devices], options)
    if program is None:
        return answer
    flops, moved = peer_costs.loops_over_once(program)
    answer |= {"flops": answer["flops"] * flops, "bytes": answer["bytes"] * moved, "counted_by_us": moved > 1}
    calls: Counter[str] = Counter()
    for computation, name, times in program.executed():
        if 'custom_call_target="tpu_custom_call"' in program.instruction(computation, name):
            calls[re.sub(r"\.\d+$", "", name)] += times
    return answer | {"kernel_calls": calls}


def compiled_kernels(folder: Path, topology: Topology) -> dict[str, int]:
    """Return the cycles of one call of each kernel."""
    with tempfile.TemporaryDirectory() as dumped:
        flags = [os.environ.get("LIBTPU_INIT_ARGS", ""), f"--xla_jf_dump_to={dumped} --xla_jf_dump_llo_text=true"]
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags)  # read when libtpu is loaded
        from jax.experimental import topologies

        device = topologies.get_topology_desc(platform="tpu", topology_name=topology.libtpu_name).devices[0]
        kernels = peer_kernels.kernels_in((folder / "step.mlir").read_bytes())
        return peer_kernels.kernel_cycles(kernels, device, Path(dumped))


if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    main(sys.argv[1], json.loads(sys.argv[2]))
