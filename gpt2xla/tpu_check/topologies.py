"""The TPUs that the check compiles for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """One host's TPUs.

    Attributes:
        libtpu_name: how libtpu calls it.
        kind: what its devices call themselves.
        devices: as PyTorch/XLA counts them: cores on v2 and v3, chips on others.
        flops: peak of one device in bf16, per second.
        bandwidth: of one device's memory, in bytes per second. Both from Google's system architecture pages.
        memory: of one device as its compiler counts it, in GiB; a little is kept for the runtime.
    """

    libtpu_name: str
    kind: str
    devices: int
    flops: float
    bandwidth: float
    memory: float


TOPOLOGIES = {
    "v3-8": Topology("v3:2x2", "TPU v3", 8, 61.5e12, 450e9, 15.48),
    "v4-8": Topology("v4:2x2x1", "TPU v4", 4, 275e12, 1228e9, 30.75),
    "v5e-8": Topology("v5e:2x4", "TPU v5 lite", 8, 197e12, 819e9, 15.75),
    "v5p-8": Topology("v5p:2x2x1", "TPU v5", 4, 459e12, 2765e9, 95.74),
    "v6e-8": Topology("v6e:2x4", "TPU v6 lite", 8, 918e12, 1640e9, 31.25),
}
