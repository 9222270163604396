"""The seam stays narrow, and its plainest runtime refuses what it cannot do."""

from pathlib import Path

import pytest
import torch

from gpt2xla.config import ModelConfig, OptimConfig, TorchConfig
from gpt2xla.data.windows import Batch
from gpt2xla.errors import InputError
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.runtime.base import Device, Processes, Runtime
from gpt2xla.runtime.one_device import OneDevice
from gpt2xla.runtime.torch.accelerators import Cuda
from gpt2xla.runtime.torch.parallel import check_backend


def methods(protocol: type) -> set[str]:
    return {name for name in dir(protocol) if not name.startswith("_") and callable(getattr(protocol, name))}


def test_the_seam_is_narrow() -> None:
    assert len(methods(Device)) <= 3
    assert len(methods(Processes)) <= 7
    assert methods(Device) | methods(Processes) < methods(Runtime)
    assert len(methods(Runtime)) <= 23
    assert methods(OneDevice) == methods(Runtime), "nothing else is public"


def test_collectives_of_one_process_refuse_several() -> None:
    runtime = OneDevice(torch.device("cpu"), world_size=2)
    value = torch.ones(())
    for collective in (runtime.sum, runtime.gather_rows, runtime.gather, runtime.barrier, runtime._reduce_gradients):
        with pytest.raises(AssertionError):
            collective(value)


def test_one_process_asks_no_device_about_others() -> None:
    """float64, in which numbers travel between processes, is missing on some devices."""
    assert OneDevice(torch.device("meta")).gather(2.0**53) == [2.0**53]


def test_one_device_trains_and_resumes(tmp_path: Path) -> None:
    """Four updates in a row, or two, a snapshot, and two more: the same weights."""
    config = OptimConfig(learning_rate=0.01)
    ids = torch.arange(32).view(2, 16) % 31
    runtime = OneDevice(torch.device("cpu"))

    def train(weights: dict | None, state: dict | None, steps: range) -> tuple[dict, dict]:
        model = GPT2(ModelConfig(vocab_size=31, seq_length=16, d_model=16, num_layers=2, num_heads=2, dropout=0.1))
        model.init_weights(torch.Generator().manual_seed(0))
        model.load_state_dict(weights or model.state_dict())
        trained = runtime.setup_model(model)
        optimizer = runtime.build_optimizer(model, config, state)
        for step, batch in zip(steps, runtime.device_batches([Batch(ids, ids)] * len(steps)), strict=True):
            runtime.seed(1, step)
            loss = trained(*batch)[0]
            runtime.backward(loss)
            runtime.optimizer_step(model, optimizer, loss.detach(), rate=0.01, max_grad_norm=1.0)
        return runtime.snapshot(model, optimizer, tmp_path)

    unbroken, _ = train(None, None, range(4))
    resumed, state = train(*train(None, None, range(2)), range(2, 4))
    assert state["optimizer"]["step"] == 4
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    assert not list(tmp_path.iterdir())


def test_fsdp_on_gpus_refuses_gloo() -> None:
    """Its reductions would go over NCCL all the same."""
    gpu = Cuda.__new__(Cuda)  # which finds no GPU here
    with pytest.raises(InputError, match=r"^--fsdp needs nccl here; leave --ddp-backend gloo out$"):
        check_backend(TorchConfig(fsdp=True), "gloo", gpu)
    check_backend(TorchConfig(fsdp=True), "nccl", gpu)
    check_backend(TorchConfig(), "gloo", gpu)
