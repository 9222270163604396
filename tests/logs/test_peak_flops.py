"""The denominator and the numerator of MFU, each against an independent calculation."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt2xla.config import ModelConfig
from gpt2xla.logs.peak_flops import DEVICE_PEAK_FLOPS, named_peak_flops
from gpt2xla.logs.throughput import Throughput
from gpt2xla.model.gpt2 import GPT2

# Multiprocessors, boost clock in MHz, and floating-point operations that one of them does per clock in dense tensor-core
# products of 16 bits with fp32 sums: what the architectures' white papers and NVIDIA's product pages say of each.
CARDS = {
    "V100 SXM2": (80, 1530, 1024), "V100 PCIE": (80, 1380, 1024), "T4": (40, 1590, 1024),
    "A10": (72, 1695, 1024), "A30": (56, 1440, 2048), "A40": (84, 1740, 1024), "A100": (108, 1410, 2048),
    "RTX A6000": (84, 1800, 1024), "RTX 6000 Ada": (142, 2505, 1024), "L4": (58, 2040, 1024), "L40": (142, 2490, 512),
    "L40S": (142, 2490, 1024), "H100": (132, 1830, 4096), "H100 PCIe": (114, 1620, 4096), "H100 NVL": (132, 1545, 4096),
    "RTX 3060": (28, 1777, 512), "RTX 3060 Ti": (38, 1665, 512), "RTX 3070": (46, 1725, 512),
    "RTX 3070 Ti": (48, 1770, 512), "RTX 3080": (68, 1710, 512), "RTX 3080 Ti": (80, 1665, 512),
    "RTX 3090": (82, 1695, 512), "RTX 3090 Ti": (84, 1860, 512),
    "RTX 4060": (24, 2460, 512), "RTX 4060 Ti": (34, 2535, 512), "RTX 4070": (46, 2475, 512),
    "RTX 4070 SUPER": (56, 2475, 512), "RTX 4070 Ti": (60, 2610, 512), "RTX 4070 Ti SUPER": (66, 2610, 512),
    "RTX 4080": (76, 2505, 512), "RTX 4080 SUPER": (80, 2550, 512), "RTX 4090": (128, 2520, 512),
    "RTX 5060": (30, 2497, 512), "RTX 5060 Ti": (36, 2572, 512), "RTX 5070": (48, 2512, 512),
    "RTX 5070 Ti": (70, 2452, 512), "RTX 5080": (84, 2617, 512), "RTX 5090": (170, 2407, 512),
    "A10G": (80, 1710, 512), "L20": (92, 2520, 512), "H800": (132, 1830, 4096), "H800 PCIe": (114, 1620, 4096),
    "RTX PRO 6000 Blackwell Workstation": (188, 2617, 1024),
}  # fmt: skip
# Cores or chips that are one device: matrix units of 128 x 128 (v6e: 256 x 256), a product and a sum each per clock (MHz).
TPUS = {
    "TPU v2": (1 * 128**2, 700), "TPU v3": (2 * 128**2, 940), "TPU v4": (2 * 4 * 128**2, 1050),
    "TPU v5 lite": (4 * 128**2, 1500), "TPU v5": (2 * 4 * 128**2, 1750),
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_a_gpu_computes_what_its_multiprocessors_do(name: str) -> None:
    multiprocessors, megahertz, per_clock = CARDS[name]
    assert DEVICE_PEAK_FLOPS[name] == pytest.approx(multiprocessors * megahertz * 1e6 * per_clock, rel=0.01)


@pytest.mark.parametrize("name", TPUS)
def test_a_tpu_computes_what_its_matrix_units_do(name: str) -> None:
    cells, megahertz = TPUS[name]
    assert DEVICE_PEAK_FLOPS[name] == pytest.approx(2 * cells * megahertz * 1e6, rel=0.025)


def test_a_chip_of_two_devices_has_twice_the_rate_of_one() -> None:
    """Google's pages "TPU v2", "TPU v3" and "TPU7x (Ironwood)": TFLOPS per chip."""
    chips = {"TPU v2": 45, "TPU v3": 123, "TPU7x": 2307}
    assert {name: 2 * DEVICE_PEAK_FLOPS[name] / 1e12 for name in chips} == pytest.approx(chips)


# As the devices' drivers name them.
@pytest.mark.parametrize(
    ("device_name", "entry"),
    [
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 4070 SUPER", "RTX 4070 SUPER"),
        ("NVIDIA GeForce RTX 4070", "RTX 4070"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H800 PCIe", "H800 PCIe"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell Workstation"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", None),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2"),
        ("Tesla V100-PCIE-32GB", "V100 PCIE"),
        ("NVIDIA T400", None),
        ("TPU v5 lite", "TPU v5 lite"),
        ("TPU v5", "TPU v5"),
        ("TPU v3", "TPU v3"),
        ("TPU7x", "TPU7x"),
        ("cpu", None),
    ],
)
def test_devices_are_known_by_what_they_call_themselves(device_name: str, entry: str | None) -> None:
    assert named_peak_flops(device_name) == (DEVICE_PEAK_FLOPS[entry] if entry else None)


def test_flops_per_token_of_gpt2_are_what_its_products_are() -> None:
    """By hand: 6 x 123,653,376 parameters (without 786,432 of positions) + 12 x 12 layers x 768 x 1024 = 855,166,464; and
    torch's own count of every product, forward and backward. Only biases and layer norms, which it does not count, are
    between the two."""
    with torch.device("meta"):
        model = GPT2(ModelConfig(vocab_size=50257))
        ids = torch.zeros(2, 1024, dtype=torch.int64)
    assert model.flops_per_token() == 855_166_464
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids)[0].backward()
    uncounted = 6 * sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert model.flops_per_token() * ids.numel() == counter.get_total_flops() + uncounted * ids.numel()


def test_mfu_is_tokens_times_flops_over_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 124M at 178,000 tokens a second on an A100: 855,166,464 x 178,000 / 312e12 = 48.8%."""
    times = iter([10.0, 10.0 + 524_288 / 178_000])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    step = Throughput(855_166_464, 312e12).step(524_288)
    assert step["tokens_per_second"] == pytest.approx(178_000)
    assert step["mfu"] == pytest.approx(0.48788, abs=1e-5)
