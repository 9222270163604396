"""Peak rates of devices: the denominator of model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B).

A rate is that of dense matrix products in bf16 (fp16 if a device has no bf16) with fp32 accumulation, in FLOP/s per device
as PyTorch counts devices. Advertised rates are higher: NVIDIA's headlines double them for weights that are half zeros
("sparsity"), and double them again for GeForce cards, which accumulate in fp32 at half their rate.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the table must not wait for torch
    import torch

# By the device's name according to the CUDA driver, or its kind according to torch_xla.
DEVICE_PEAK_FLOPS = {
    # Google Cloud, "TPU architecture", its page for each version. On v2, v3 and TPU7x a device is a core, half a chip.
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "TPU7x": 1153.5e12,  # Ironwood, v7
    # NVIDIA's data sheets, without sparsity.
    "V100 SXM2": 125e12,
    "V100 SXM3": 125e12,
    "V100 PCIE": 112e12,
    "T4": 65e12,
    "A10": 125e12,
    "A10G": 70e12,  # Amazon's, by "NVIDIA A10G on AWS"
    "A30": 165e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "RTX A6000": 154.8e12,
    "RTX 6000 Ada": 364.2e12,
    "L4": 121e12,
    "L20": 119.5e12,
    "L40": 181e12,
    "L40S": 362e12,
    "H100": 989e12,  # SXM
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H800": 989e12,  # SXM, which has the H100's multiprocessors and clock, and slower links
    "H800 PCIe": 756e12,
    "H20": 148e12,  # held below export limits
    "H200": 989e12,  # SXM
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "GB300": 2500e12,
    # "NVIDIA Ampere GA102 GPU Architecture", "NVIDIA Ada GPU Architecture" and "NVIDIA RTX Blackwell GPU Architecture",
    # their tables' rows "Peak FP16 Tensor TFLOPS with FP32 Accumulate". Cards missing there follow by the same arithmetic:
    # a multiprocessor does 512 such operations per clock, at the boost clock of NVIDIA's product page.
    "RTX 3060": 25.5e12, "RTX 3060 Ti": 32.4e12, "RTX 3070": 40.6e12, "RTX 3070 Ti": 43.5e12,
    "RTX 3080": 59.5e12, "RTX 3080 Ti": 68.2e12, "RTX 3090": 71.2e12, "RTX 3090 Ti": 80.0e12,
    "RTX 4060": 30.2e12, "RTX 4060 Ti": 44.1e12, "RTX 4070": 58.3e12, "RTX 4070 SUPER": 71.0e12,
    "RTX 4070 Ti": 80.2e12, "RTX 4070 Ti SUPER": 88.2e12, "RTX 4080": 97.5e12, "RTX 4080 SUPER": 104.4e12,
    "RTX 4090": 165.2e12,
    "RTX 5060": 38.4e12, "RTX 5060 Ti": 47.4e12, "RTX 5070": 61.7e12, "RTX 5070 Ti": 87.9e12,
    "RTX 5080": 112.6e12, "RTX 5090": 209.5e12,
    # "NVIDIA RTX Blackwell PRO GPU Architecture". Max-Q and Server Edition have other clocks.
    "RTX PRO 6000 Blackwell Workstation": 503.8e12,
}  # fmt: skip
# Words that, after a name, mean another device: "RTX 4090 Laptop GPU", "RTX 5090 D", "A100-SXM4-40GB MIG 1g.5gb".
_OTHER_DEVICES = {"Ti", "SUPER", "D", "Laptop", "Mobile", "Max", "MIG", "ADA", "Ada"}


def named_peak_flops(device_name: str) -> float | None:
    """Return the peak of the longest name in the table whose words appear in `device_name`; None if there is none, or if
    the words after it mean another device."""
    words = re.split(r"[\s-]+", device_name)
    for name in sorted(DEVICE_PEAK_FLOPS, key=lambda name: -len(name)):
        parts = name.split()
        for place in range(len(words) - len(parts) + 1):
            if words[place : place + len(parts)] == parts:
                return None if _OTHER_DEVICES & set(words[place + len(parts) :]) else DEVICE_PEAK_FLOPS[name]
    return None


def measured_cpu_flops(dtype: torch.dtype) -> float:
    """Measure this process's rate of a large matrix product on the CPU, in FLOP/s: the best of several short runs, which
    take about a tenth of a second together."""
    import torch

    a = torch.ones(768, 768, dtype=dtype)
    a @ a
    seconds: list[float] = []
    while sum(seconds) < 0.1:
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * 768**3 / min(seconds)
