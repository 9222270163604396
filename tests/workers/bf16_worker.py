"""Run by test_kernels.py in its own process: how far bf16 gradients are from those in float64, on XLA and on the CPU.

Prints one JSON object: by device the distances, one per batch, of the plain formulas and of what the runtime chooses in
their place; within documents, how far fp32 gradients on XLA are from those of the documents one by one; and, by type, how
far gradients of biases are from their exact values.
"""

import dataclasses
import itertools
import json
from functools import partial
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
from torch import Tensor

from gpt2xla.config import ModelConfig
from gpt2xla.model.attention import chunked_attention, kept_attention
from gpt2xla.model.gpt2 import GPT2, Linear
from gpt2xla.model.kernels import Kernels
from gpt2xla.model.loss import chunked_cross_entropy, in_place_cross_entropy
from gpt2xla.model.norm import lean_layer_norm

CONFIG = ModelConfig(vocab_size=1024, seq_length=256, d_model=128, num_layers=4, num_heads=2)
BATCHES = 16
FENCE = xm.optimization_barrier_
KERNELS = {
    "xla": Kernels(
        attention=partial(chunked_attention, fence=FENCE),
        cross_entropy=partial(chunked_cross_entropy, chunks=3, fence=FENCE),
        layer_norm=partial(lean_layer_norm, fence=FENCE),
        separate_qkv=True,
    ),
    "cpu": Kernels(attention=kept_attention, cross_entropy=partial(in_place_cross_entropy, chunks=3)),
}


def gradient(model: GPT2, batch: int) -> Tensor:
    """Of the mean loss by all parameters at once, as a float64 on the host."""
    device = model.wte.weight.device
    ids = torch.randint(
        0, CONFIG.vocab_size, (4, CONFIG.seq_length + 1), generator=torch.Generator().manual_seed(batch)
    )
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=model.wte.weight.dtype == torch.float32):
        loss, count = model(ids[:, :-1].to(device), ids[:, 1:].to(device))
    (loss / count).backward()
    flat = flat_gradient(model)
    model.zero_grad(set_to_none=True)
    return flat


def flat_gradient(model: GPT2) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu().double()


def model_on(device: str, dtype: torch.dtype, kernels: Kernels, config: ModelConfig = CONFIG) -> GPT2:
    model = GPT2(config)
    model.init_weights(torch.Generator().manual_seed(3))
    model.kernels = kernels
    return model.to(device, dtype)


def within_documents() -> dict[str, float]:
    """Return the relative distance, and how many operations fell back to the host."""
    config = dataclasses.replace(CONFIG, seq_length=64, d_model=32, num_layers=1)
    ids = torch.randint(1, CONFIG.vocab_size, (2, 65), generator=torch.Generator().manual_seed(0))
    cuts = [[0, 1, 17, 63, 64], [0, 40, 64]]
    for row, starts in zip(ids, cuts, strict=True):
        row[starts[1:-1]] = 0
    alone, packed = (
        model_on("cpu", torch.float64, Kernels(), config),
        model_on("xla", torch.float32, KERNELS["xla"], config),
    )
    packed.end_of_text = 0
    for row, starts in zip(ids, cuts, strict=True):
        for start, stop in itertools.pairwise(starts):
            alone(row[None, start:stop], row[None, start + 1 : stop + 1])[0].backward()
    on_device = ids.to("xla")
    packed(on_device[:, :-1], on_device[:, 1:])[0].backward()
    torch_xla.sync()
    fallbacks = sum(met.counter_value(name) for name in met.counter_names() if name.startswith("aten::"))
    exact, found = (flat_gradient(model) for model in (alone, packed))
    return {"distance": ((found - exact).norm() / exact.norm()).item(), "fallbacks": fallbacks}


def bias_errors() -> dict[str, float]:
    """Return the largest relative errors, by type. Half of the way to it, a sum in fp16 would have overflowed."""
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        dy_BTE = torch.randn(4, 1024, 8, generator=torch.Generator().manual_seed(0))
        dy_BTE[:2] += 60
        dy_BTE[2:] -= 52
        layer, dy_BTE = Linear(8, 8).to("xla"), dy_BTE.to(dtype)
        with torch.autocast("xla", dtype):
            y_BTE = layer(torch.zeros(4, 1024, 8, device="xla"))
        y_BTE.backward(dy_BTE.to("xla"))
        assert layer.bias.grad is not None
        errors[str(dtype)] = (layer.bias.grad.cpu() / dy_BTE.double().sum((0, 1)) - 1).abs().max().item()
    return errors


def main() -> None:
    torch_xla.device()  # autograd only knows devices that were there when it first ran
    documents = within_documents()
    reference = model_on("cpu", torch.float64, Kernels())
    exact = [gradient(reference, batch) for batch in range(BATCHES)]
    distances: dict[str, Any] = {"documents": documents, "biases": bias_errors()}
    for device, chosen in KERNELS.items():
        distances[device] = {}
        for name, kernels in (("plain", Kernels()), ("chosen", chosen)):
            model = model_on(device, torch.float32, kernels)
            distances[device][name] = [
                (gradient(model, batch) - exact[batch]).norm().item() for batch in range(BATCHES)
            ]
    print(json.dumps(distances))


if __name__ == "__main__":
    main()
