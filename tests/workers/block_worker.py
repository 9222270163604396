"""Run by test_tpu_forms.py on XLA's CPU: models whose blocks' products are interpreted kernels, beside the model in float64.

Prints a JSON object: for each case the relative errors of the loss and of each gradient, of this model and of the plain
one. In fp32 the kernels check the formulas. Its argument is 1 for all cases, 0 for the first."""

import json
import sys

import interpreted_kernels
import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch import Tensor

from gpt2xla.config import ModelConfig
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Kernels
from gpt2xla.runtime.xla.block import fused_blocks

SMALL = ModelConfig(vocab_size=256, seq_length=128, d_model=128, num_layers=2, num_heads=2)
CASES = {
    "gelu-tanh": {},
    "no biases": {"bias": False},
    "relu, own head, wide": {"activation": "relu", "tie_weights": False, "d_ff": 640},
    "documents": {},
}


def model_of(config: ModelConfig, documents: bool) -> GPT2:
    model = GPT2(config)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():  # layer norms and biases must matter
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.end_of_text = 0 if documents else None
    return model


def gradients(model: GPT2, ids: Tensor) -> dict[str, Tensor]:
    loss, _ = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    found = {"loss": loss, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    torch_xla.sync()
    return {name: tensor.detach().cpu().double() for name, tensor in found.items() if tensor is not None}


def main() -> None:
    torch_xla.device()  # autograd only knows devices that were there when it first ran
    errors: dict[str, dict[str, list[float]]] = {}
    for case, changes in list(CASES.items())[: None if int(sys.argv[1]) else 1]:
        config = ModelConfig(**{**SMALL.__dict__, **changes})
        ids = torch.randint(0, 64, (2, SMALL.seq_length + 1), generator=torch.Generator().manual_seed(1))
        truth = gradients(model_of(config, case == "documents").double(), ids)
        for bf16 in (False, True):
            if case == "documents" and not bf16:
                continue  # only the attention kernels know them, and they know only bf16
            interpreted_kernels.install(exact=not bf16)
            fence = xm.optimization_barrier_
            fused = fused_blocks(config, "TPU v5 lite", fence)
            assert fused
            found = []
            for kernels in (
                Kernels(block=fused.block, layer_norm=fused.layer_norm, attention=lambda *_: None),
                Kernels(),
            ):
                model = model_of(config, case == "documents")
                model.kernels = kernels
                with torch.autocast("xla", torch.bfloat16, enabled=bf16):
                    found.append(gradients(model.to("xla"), ids.to("xla")))
            errors[f"{case}, {'bf16' if bf16 else 'fp32'}"] = {
                name: [float((x[name] - exact).norm() / exact.norm()) for x in found] for name, exact in truth.items()
            }
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
