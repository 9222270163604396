"""The TPUs that the check compiles for."""

from __future__ import annotations

from dataclasses import dataclass

from gpt2xla.logs.peak_flops import DEVICE_PEAK_FLOPS
from gpt2xla.runtime.xla.compiler_messages import HBM_GIB


@dataclass(frozen=True)
class Topology:
    """One host's TPUs."""

    libtpu_name: str  # libtpu's name of it
    kind: str  # what its devices call themselves
    devices: int  # how many PyTorch/XLA counts: cores on v2 and v3, chips on others
    bandwidth: float  # of one device's memory, in bytes per second, from Google's system architecture pages

    @property
    def memory(self) -> float:
        """Of one device, in GiB."""
        return HBM_GIB[self.kind]

    @property
    def flops(self) -> float:
        """Peak of one device in bf16, per second."""
        return DEVICE_PEAK_FLOPS[self.kind]


TOPOLOGIES = {
    "v3-8": Topology("v3:2x2", "TPU v3", 8, 450e9),
    "v4-8": Topology("v4:2x2x1", "TPU v4", 4, 1228e9),
    "v5e-8": Topology("v5e:2x4", "TPU v5 lite", 8, 819e9),
    "v5p-8": Topology("v5p:2x2x1", "TPU v5", 4, 2765e9),
    "v6e-8": Topology("v6e:2x4", "TPU v6 lite", 8, 1640e9),
}
