"""Run by test_kernels.py in its own process: how far bf16 gradients are from those in float64, on XLA and on the CPU.

Prints one JSON object: by device the distances, one per batch, of the plain formulas and of what the runtime chooses in
their place.
"""

import json
from functools import partial

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch import Tensor

from gpt2xla.config import ModelConfig
from gpt2xla.model.attention import chunked_attention, kept_attention
from gpt2xla.model.gpt2 import GPT2
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
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu().double()
    model.zero_grad(set_to_none=True)
    return flat


def model_on(device: str, dtype: torch.dtype, kernels: Kernels) -> GPT2:
    model = GPT2(CONFIG)
    model.init_weights(torch.Generator().manual_seed(3))
    model.kernels = kernels
    return model.to(device, dtype)


def main() -> None:
    torch_xla.device()  # autograd only knows devices that were there when it first ran
    reference = model_on("cpu", torch.float64, Kernels())
    exact = [gradient(reference, batch) for batch in range(BATCHES)]
    distances: dict[str, dict[str, list[float]]] = {}
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
