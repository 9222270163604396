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
    # Of one device's matrix units in bf16, 2 for each of their places. Google's system architecture pages name the units of
    # a core, of 128 x 128 each: 2 on v3, and 4 on v4, v5e and v5p, where a chip of v4 or v5p has two cores. The peaks then
    # need 940, 1050, 1500 and 1750 MHz; Jouppi et al. (2021, 2023) give those of v3 and v4. v6e is derived: four units of
    # 256 x 256 at 1750 MHz. Two, of which Google writes, would be too few for what its own compiler expects.
    flops_per_cycle: int

    @property
    def memory(self) -> float:
        """Of one device, in GiB."""
        return HBM_GIB[self.kind]

    @property
    def flops(self) -> float:
        """Peak of one device in bf16, per second."""
        return DEVICE_PEAK_FLOPS[self.kind]

    @property
    def clock(self) -> float:
        """Cycles per second at which the matrix units reach their peak."""
        return self.flops / self.flops_per_cycle

    @property
    def bytes_per_cycle(self) -> float:
        """Of one device's memory."""
        return self.bandwidth / self.clock


TOPOLOGIES = {
    "v3-8": Topology("v3:2x2", "TPU v3", 8, 450e9, 2 * 2 * 128**2),
    "v4-8": Topology("v4:2x2x1", "TPU v4", 4, 1228e9, 2 * 8 * 128**2),
    "v5e-8": Topology("v5e:2x4", "TPU v5 lite", 8, 819e9, 2 * 4 * 128**2),
    "v5p-8": Topology("v5p:2x2x1", "TPU v5", 4, 2765e9, 2 * 8 * 128**2),
    "v6e-8": Topology("v6e:2x4", "TPU v6 lite", 8, 1640e9, 2 * 4 * 256**2),
}
