"""Run by test_tpu_forms.py on XLA's CPU: losses of many updates by the forms that TPUs use, and by the plain ones.

Arguments: fp32 or bf16, the number of updates, then seeds, which share their programs. Prints a JSON object: by form, for
each seed its losses. The kernels of flash attention are interpreted, in both of their forms; in fp32, which they do not
know, plain formulas stand in their place, inside the same autograd function."""

import dataclasses
import json
import sys
from functools import partial

import interpreted_kernels
import torch
import torch_xla
import torch_xla.core.xla_model as xm

from gpt2xla.config import ModelConfig
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Kernels
from gpt2xla.model.loss import chunked_cross_entropy
from gpt2xla.model.norm import lean_layer_norm
from gpt2xla.runtime.xla.block import fused_blocks
from gpt2xla.runtime.xla.flash import flash_attention_for

CONFIG = ModelConfig(vocab_size=256, seq_length=128, d_model=128, num_layers=2, num_heads=2)
SEQUENCES = 2  # of one, the CPU of XLA does not run a product that the blocks need


def batches(updates: int, seed: int) -> torch.Tensor:
    """Return ids (updates, B, T + 1) of a language to learn: each id has four that may follow it."""
    generator = torch.Generator().manual_seed(seed)
    following = torch.randint(CONFIG.vocab_size, (CONFIG.vocab_size, 4), generator=generator)
    ids = torch.empty(updates, SEQUENCES, CONFIG.seq_length + 1, dtype=torch.int64)
    ids[..., 0] = torch.randint(CONFIG.vocab_size, (updates, SEQUENCES), generator=generator)
    choices = torch.randint(4, ids.shape, generator=generator)
    for place in range(CONFIG.seq_length):
        ids[..., place + 1] = following[ids[..., place], choices[..., place]]
    return ids


def losses(kernels: Kernels, bf16: bool, updates: int, seed: int) -> list[float]:
    model = GPT2(CONFIG)
    model.init_weights(torch.Generator().manual_seed(seed))
    model.kernels = kernels
    model.to("xla")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), capturable=True, foreach=False)
    found = []
    for ids in batches(updates, seed).to("xla").unbind():
        with torch.autocast("xla", torch.bfloat16, enabled=bf16):
            loss, count = model(ids[:, :-1], ids[:, 1:])
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append((loss / count).detach())
        torch_xla.sync()
    return torch.stack(found).tolist()


def main() -> None:
    bf16, updates, seeds = sys.argv[1] == "bf16", int(sys.argv[2]), [int(seed) for seed in sys.argv[3:]]
    fence = xm.optimization_barrier_
    torch_xla.device()  # autograd only knows devices that were there when it first ran
    interpreted_kernels.install(exact=not bf16)

    def forms(device_kind: str) -> Kernels:
        return Kernels(
            projected_attention=flash_attention_for(device_kind),
            cross_entropy=partial(chunked_cross_entropy, chunks=4, fence=fence),
            layer_norm=partial(lean_layer_norm, fence=fence),
        )

    fused = fused_blocks(CONFIG, "TPU v5 lite", fence)
    assert fused
    kernels = {"plain": Kernels(), "transposed": forms("TPU v5")}
    if bf16:  # in fp32 both forms are the same formulas
        kernels["rows"] = forms("TPU v4")
    kernels["blocks"] = dataclasses.replace(kernels["transposed"], block=fused.block, layer_norm=fused.layer_norm)
    print(json.dumps({name: [losses(k, bf16, updates, seed) for seed in seeds] for name, k in kernels.items()}))


if __name__ == "__main__":
    main()
