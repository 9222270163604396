"""Matrix products for generating text on a CPU: weights in the layout that oneDNN reads fastest.

A decoding step multiplies each weight matrix by one row or a few, so it takes as long as reading the weights from memory.
torch's own product of one row reads at half of the memory's bandwidth; oneDNN's, with a weight in its layout, reads at nine
tenths, in fp32 and in bf16. These are the operators that torch.compile puts into frozen models.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from gpt2xla.model.gpt2 import GPT2

_ROWS = 1  # the layout is chosen for products of one row; products of more rows work too


def pack_linears(model: GPT2) -> str | None:
    """Replace the linear layers and the output head of a model on the CPU by packed ones; it cannot train afterwards.

    Returns:
        None, or why it could not be done; the model is unchanged then."""
    dtype = model.wte.weight.dtype
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bf16 arithmetic"
    try:
        head = PackedLinear(model.head_weight, None)
        head(model.wte.weight[:1])
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        return f"this torch ({torch.__version__}) does not have it ({type(error).__name__})"
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child is not getattr(model, "lm_head", None):
                setattr(module, name, PackedLinear(child.weight, child.bias))
    model.kernels = dataclasses.replace(model.kernels, head=lambda x, weight: head(x), separate_qkv=False)
    return None


class PackedLinear(nn.Module):
    """y = x W^T + b for W of shape (out, in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
