"""What the torch runner does to be fast on a CPU: exact products, memory that is kept, and when it compiles."""

import resource
import subprocess
import sys

import pytest
import torch

from gpt2xla.config import ModelConfig, TorchConfig, TrainConfig
from gpt2xla.errors import InputError
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.torch.accelerators import Cpu
from gpt2xla.runtime.torch.cpu import choose_products
from gpt2xla.runtime.torch.host_memory import keep_freed_memory
from gpt2xla.runtime.torch.runtime import TorchRuntime

CONFIG = ModelConfig(vocab_size=61, seq_length=64, d_model=32, num_layers=2, num_heads=4)

FAULTS = """
import resource, sys, torch
from gpt2xla.runtime.torch.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.set_num_threads(1)
for _ in range(20):  # until the heap has room for one with what aligns it
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_not_fetched_again_page_by_page() -> None:
    """Ten times 64 MiB, freed each time: the system counts the pages that it hands out."""

    def faults(how: str) -> int:
        return int(
            subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout
        )

    pages = 2**26 // resource.getpagesize()
    assert faults("keep") < pages / 10
    assert faults("do not") > 5 * pages


def test_deterministic_does_not_fill_new_tensors() -> None:
    """Which takes a pass over each of them, of logits and gradients too."""
    try:
        TorchRuntime(TorchConfig(), TrainConfig(deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.empty(1000).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_is_not_kept_where_the_address_space_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**40, 2**40))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("malloc was changed"))
    keep_freed_memory()


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_products_are_exact(precision: str) -> None:
    try:
        choose_products(precision)
        a, b = torch.randn(2, 128, 300, 300, generator=torch.Generator().manual_seed(1))
        exact = a.double() @ b.double()
        assert (a @ b - exact).norm() / exact.norm() < 1e-6
    finally:
        torch.set_float32_matmul_precision("highest")


def test_long_runs_alone_are_compiled_unasked() -> None:
    model = GPT2(CONFIG)
    runtime = TorchRuntime(TorchConfig(compile_cache=""), TrainConfig())

    def is_compiled(model: GPT2, evaluated_tokens: int | None = None) -> bool:
        runtime.setup_model(model, evaluated_tokens)
        return model.kernels.compiled is not None

    per_step = model.flops_per_token() * CONFIG.seq_length * 32 * 8
    for steps, expected in ((int(2e14 / per_step) - 1, False), (int(2e14 / per_step) + 1, True)):
        runtime.train = TrainConfig(train_steps=steps)
        assert is_compiled(model) == expected
        runtime.train = TrainConfig(train_steps=steps, compile=False)
        assert not is_compiled(model)
    runtime.train = TrainConfig()
    for tokens, expected in ((1000, False), (int(3 * 2e14 / model.flops_per_token()) + 1, True)):
        assert is_compiled(model, tokens) == expected, "an evaluation: forward alone"


def test_without_a_compiler_nothing_is_compiled_and_asking_for_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.cpp_builder as cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert "C++ compiler" in (Cpu().why_not_compiled() or "")
    model = GPT2(CONFIG)
    TorchRuntime(TorchConfig(), TrainConfig(train_steps=10**9)).setup_model(model)
    assert model.kernels.compiled is None
    runtime = TorchRuntime(TorchConfig(), TrainConfig(compile=True))
    with pytest.raises(InputError, match=r"^--compile: it needs a C\+\+ compiler, such as g\+\+; leave it out$"):
        runtime.setup_model(GPT2(CONFIG))
