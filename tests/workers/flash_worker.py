"""Run by test_tpu_forms.py under SPMD on two CPUs of XLA: projection and flash attention as one function, with
interpreted kernels, within documents, beside attention in float64.

Prints a JSON object: for each case the relative error of the value and of each gradient, of this function and of torch's own
operations in bf16 on XLA; and how large the gradient of k's bias is."""

import json
from typing import Any

import interpreted_kernels
import numpy as np
import torch
import torch.nn.functional as F
import torch_xla
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor

from gpt2xla.model.attention import sdpa_attention
from gpt2xla.model.documents import document_mask, document_starts
from gpt2xla.runtime.xla.flash import flash_attention_for

B, T, D, HEADS = 2, 128, 128, 2


def plain(x_BTD: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int, starts_BT: Tensor) -> Tensor:
    q, k, v = F.linear(x_BTD, weight, bias).chunk(3, -1)
    return sdpa_attention(q, k, v, num_heads, mask_B1TS=document_mask(starts_BT, q.dtype))


def results(function: Any, tensors: dict[str, Tensor], starts_BT: Tensor) -> dict[str, Tensor]:
    own = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if name != "dy"}
    y = function(own["x"], own["weight"], own.get("bias"), HEADS, starts_BT)
    y.backward(tensors["dy"].to(y.dtype))
    gradients = {name: tensor.grad for name, tensor in own.items() if tensor.grad is not None}
    torch_xla.sync()  # one program
    return {name: tensor.detach().cpu().double() for name, tensor in {"y": y, **gradients}.items()}


def main() -> None:
    xr.use_spmd()
    interpreted_kernels.install()
    mesh = xs.Mesh(np.arange(2), (2,), ("devices",))
    flash = flash_attention_for("TPU v5", mesh)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(B, T, D, generator=generator),
        "weight": torch.randn(3 * D, D, generator=generator) * D**-0.5,
        "bias": torch.randn(3 * D, generator=generator),
        "dy": torch.randn(B, T, D, generator=generator),
    }
    ids = torch.zeros(B, T, dtype=torch.int64)
    ids[0, 5] = ids[0, 127] = ids[1, 64] = 1
    errors: dict[str, Any] = {}
    for name in ("biases", "no biases"):
        starts = document_starts(ids, 1)
        used = {key: tensor for key, tensor in tensors.items() if key != "bias" or name == "biases"}
        exact = results(plain, {key: tensor.double() for key, tensor in used.items()}, starts)
        split = {key: tensor.to("xla") for key, tensor in used.items()}
        for key in ("x", "dy"):
            xs.mark_sharding(split[key], mesh, ("devices", None, None))
        with torch.autocast("xla", torch.bfloat16):
            found, own = (results(function, split, starts.to("xla")) for function in (flash, plain))
        errors[name] = {
            key: [float((x[key] - exact[key]).norm() / exact[key].norm()) for x in (found, own)] for key in exact
        }
        if name == "biases":
            errors["bias of k"] = float(found["bias"][D : 2 * D].norm())
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
