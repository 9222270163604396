"""Run by test_fused.py with TRITON_INTERPRET=1: models of fused blocks, in Triton's interpreter, beside plain ones.

Prints a JSON object: for each case the relative errors of the loss and of each gradient, with fused and plain blocks."""

import copy
import dataclasses
import json
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from gpt2xla.config import ModelConfig
from gpt2xla.model.fused import add_norm
from gpt2xla.model.fused.block import fused_block, fused_layer_norm
from gpt2xla.model.fused.feed_forward import Tile
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Kernels
from gpt2xla.runtime.torch import parallel
from gpt2xla.runtime.torch.accelerators import Cpu

TILE = Tile(16, 32, 16, 4, 2)
FUSED = Kernels(block=fused_block, layer_norm=fused_layer_norm)
SMALL = {"vocab_size": 31, "seq_length": 9, "d_model": 24, "num_heads": 2}
CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "two layers": ({"num_layers": 2}, torch.float32),
    "odd widths, no biases, activation in products": (
        {"d_model": 33, "num_heads": 3, "d_ff": 300, "activation": "gelu-exact", "bias": False},
        torch.float32,
    ),
    "within documents": ({}, torch.float32),
    "bf16": ({"activation": "relu"}, torch.bfloat16),
    "fp16, activation in products": ({}, torch.float16),  # the interpreter multiplies the bits of bf16
}


def results(model: GPT2, kernels: Kernels, ids: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    model.kernels = kernels
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype.itemsize == 2):
        loss, _ = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def checkpointed(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


def split_over_processes(model: GPT2) -> GPT2:
    """As --fsdp does, over this process alone: a block's parameters are gone as soon as it has run."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    return parallel.shard_fully(model, init_device_mesh("cpu", (1,)), Cpu(), torch.float32)


def main() -> None:
    add_norm.PROGRAMS = 4  # so that each has several rows
    errors: dict[str, dict[str, tuple[float, float]]] = {}
    for name, (changes, dtype) in CASES.items():
        config = ModelConfig(**{**SMALL, "num_layers": 1, **changes})
        generator = torch.Generator().manual_seed(1)
        model = GPT2(config)
        model.init_weights(generator)
        with torch.no_grad():  # biases and norms as training leaves them
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        ids = torch.randint(0, config.vocab_size, (2, config.seq_length + 1), generator=generator)
        model.end_of_text = int(ids[0, 4]) if "documents" in name else None
        plain = results(model, Kernels(), ids, dtype)
        kernels = dataclasses.replace(FUSED, block=partial(fused_block, tile=TILE)) if "products" in name else FUSED
        fused = results(model, kernels, ids, dtype)
        if name == "two layers":
            again = results(model, dataclasses.replace(FUSED, checkpoint=checkpointed), ids, dtype)
            assert all(torch.equal(fused[key], again[key]) for key in fused), "checkpointed blocks differ"
            split = results(split_over_processes(copy.deepcopy(model)), FUSED, ids, dtype)
            assert all(torch.equal(fused[key], parallel.joined(split[key])) for key in fused), "split blocks differ"
        exact = results(model.double(), Kernels(), ids, torch.float64)
        errors[name] = {
            key: tuple(float((found[key] - exact[key]).norm() / exact[key].norm()) for found in (fused, plain))
            for key in exact
        }  # type: ignore[misc]
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
