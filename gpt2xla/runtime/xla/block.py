"""The block as one PyTorch/XLA function, whose products are the kernels of `pallas_block.py`.

A layer norm belongs to the product before it, which is the block before's. So a residual stream goes from block to block
together with what its next layer norm needs, and only the gradient of the stream itself comes back.
Shape suffixes: B sequences, T tokens, D d_model, E = 3 D, F d_ff, N = B * T."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch_xla
from torch import Tensor, nn

from gpt2xla.config import ModelConfig
from gpt2xla.model.arithmetic import Fence, compute_dtype
from gpt2xla.model.gpt2 import Block
from gpt2xla.model.kernels import Fused
from gpt2xla.model.norm import denormalised, lean_layer_norm, normalise
from gpt2xla.runtime.xla import flash
from gpt2xla.runtime.xla.pallas_call import pallas_call

_MATRICES = (2, 4, 8, 10)  # of a block's parameters


class Stream(NamedTuple):
    """A residual stream, and its rows normalised, in bf16, with what they were multiplied by; the last two carry no
    gradients."""

    x_BTD: Tensor
    normalised_ND: Tensor
    scale: Tensor  # (N / R, 1, R), as the kernels keep it


def fused_blocks(model: ModelConfig, device_kind: str, fence: Fence) -> Fused:
    """Return the block and the layer norm behind the last one, for runs in bf16 on sequences of full length, of models and
    devices that `pallas_choice.blocks_are_kernels` accepts."""

    def block(block: Block, x: Tensor | Stream, starts_BT: Tensor | None = None) -> Stream:
        attn, mlp = block.attn, block.mlp
        layers = (block.ln_1, attn.c_attn, attn.c_proj, block.ln_2, mlp.c_fc, mlp.c_proj)
        stream = x if isinstance(x, Stream) else _normalised(x, model.layer_norm_eps, fence)
        parameters = [value for layer in layers for value in (layer.weight, layer.bias)]
        return Stream(*_Block.apply(*stream, starts_BT, model, device_kind, fence, *parameters))

    def layer_norm(x: Tensor | Stream, norm: nn.LayerNorm) -> Tensor:
        if not isinstance(x, Stream):
            return lean_layer_norm(x, norm, fence)
        shape = (*x.x_BTD.shape[:2], -1)
        return denormalised(x.x_BTD, x.normalised_ND.view(shape), x.scale.view(shape), norm)

    return Fused(block, layer_norm, "blocks' products in kernels")


def _normalised(x_BTD: Tensor, eps: float, fence: Fence) -> Stream:
    from gpt2xla.model.pallas_block import Rows

    x_BTD = x_BTD.float()
    normalised_BTD, scale_BT1 = normalise(x_BTD.detach(), eps, compute_dtype(x_BTD))
    fence([normalised_BTD])
    rows = Rows(scale_BT1.numel(), 0, 0).R
    return Stream(x_BTD, normalised_BTD.flatten(0, 1), scale_BT1.view(-1, 1, rows))


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, normalised_ND: Tensor, scale: Tensor, starts_BT: Tensor | None, model: ModelConfig,
        device_kind: str, fence: Fence, *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        shape = x_BTD.shape
        call = functools.partial(_call, normalised_ND, model)
        norm_1, bias_1, attn_ED, attn_E, proj_DD, proj_D, norm_2, bias_2, fc_FD, fc_F, out_DF, out_D = (
            _operand(value, size, normalised_ND) for value, size in zip(parameters, _sizes(model), strict=True)
        )
        x_ND = x_BTD.flatten(0, 1)
        qkv = [part.view(shape) for part in call("project", normalised_ND, norm_1, bias_1, attn_ED, attn_E)]
        heads = (model.num_heads, device_kind, None)
        y_BTD, log_sums = flash.call("forward", starts_BT, qkv, *heads)
        x_ND, normalised_2_ND, scale_2 = call("add_and_normalise", y_BTD.flatten(0, 1), proj_DD, proj_D, x_ND)
        h_NF = call("expand", normalised_2_ND, norm_2, bias_2, fc_FD, fc_F)[0]
        x_ND, *following = call("add_and_normalise", h_NF, out_DF, out_D, x_ND, activated=True)
        ctx.mark_non_differentiable(*following)
        ctx.model, ctx.fence, ctx.heads, ctx.has_bias = model, fence, heads, [value is not None for value in parameters]
        ctx.save_for_backward(
            starts_BT, normalised_ND, scale, *qkv, y_BTD, log_sums, normalised_2_ND, scale_2, h_NF,
            norm_1, bias_1, norm_2, bias_2, *(parameters[index] for index in _MATRICES),
        )  # fmt: skip
        return x_ND.view(shape), *following

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (
            starts_BT, normalised_ND, scale, q_BTD, k_BTD, v_BTD, y_BTD, log_sums, normalised_2_ND, scale_2, h_NF,
            norm_1, bias_1, norm_2, bias_2, *matrices,
        ) = ctx.saved_tensors  # fmt: skip
        # Rounded again: those of all layers, kept since the forward pass, would take as much memory as a layer does.
        matrices = [matrix.clone() for matrix in matrices]
        ctx.fence(matrices)
        attn_ED, proj_DD, fc_FD, out_DF = (matrix.to(normalised_ND.dtype) for matrix in matrices)
        shape = y_BTD.shape
        dx_ND = grads[0].flatten(0, 1)
        call = functools.partial(_call, normalised_ND, ctx.model)

        dh_NF, dfc_SF, dout_SD = call("differentiate_activation", dx_ND, out_DF, h_NF)
        dout_DF = _product("mlp.c_proj", dx_ND.to(normalised_ND.dtype).t(), _activated(h_NF, ctx.model))
        dfc_FD = _product("mlp.c_fc", dh_NF.t(), _read(normalised_2_ND, norm_2, bias_2))
        dx_ND, sums_2 = call("differentiate_norm", dh_NF, fc_FD, normalised_2_ND, scale_2, norm_2, dx_ND)

        dy_ND = dx_ND.to(normalised_ND.dtype)
        dproj_DD = _product("attn.c_proj", dy_ND.t(), y_BTD.flatten(0, 1))
        tensors = [q_BTD, k_BTD, v_BTD, y_BTD, log_sums, _product("attn.c_proj", dy_ND, proj_DD).view(shape)]
        *dqkv, sums_B3D = flash.call("backward", starts_BT, tensors, *ctx.heads, joint=False)
        dqkv = [gradient.flatten(0, 1) for gradient in dqkv]
        read_ND = _read(normalised_ND, norm_1, bias_1)
        dattn_ED = torch.cat([_product("attn.c_attn", gradient.t(), read_ND) for gradient in dqkv])
        dx_ND, sums_1 = call("differentiate_projections", *dqkv, attn_ED, normalised_ND, scale, norm_1, dx_ND)
        dnorm_1, dbias_1, _ = sums_1.sum(1)
        dnorm_2, dbias_2, dproj_D = sums_2.sum(1)
        gradients = [
            dnorm_1, dbias_1, dattn_ED, sums_B3D.sum(0).flatten(), dproj_DD, dproj_D,
            dnorm_2, dbias_2, dfc_FD, dfc_SF.sum(0), dout_DF, dout_SD.sum(0),
        ]  # fmt: skip
        there = [value.float() if has else None for value, has in zip(gradients, ctx.has_bias, strict=True)]
        return dx_ND.view(shape), None, None, None, None, None, None, *there


def _call(kept_ND: Tensor, model: ModelConfig, kernel: str, *tensors: Tensor, **options: bool) -> list[Tensor]:
    from gpt2xla.model import pallas_block

    bf16 = kept_ND.dtype == torch.bfloat16
    rows = pallas_block.Rows(len(kept_ND), model.d_model, model.d_ff, model.activation, model.layer_norm_eps, bf16)
    return pallas_call(getattr(pallas_block, kernel), rows, list(tensors), **options)


def _sizes(model: ModelConfig) -> list[int]:
    """Return how many outputs each of a block's layers has, twice: for its weight and for its bias."""
    D = model.d_model
    return [size for size in (D, 3 * D, D, D, model.d_ff, D) for _ in range(2)]


def _operand(value: Tensor | None, size: int, kept_ND: Tensor) -> Tensor:
    """Return a parameter as kernels read it: a matrix in the type of what is kept, else a row in fp32; zeros for None."""
    if value is None:
        return torch.zeros(1, size, device=kept_ND.device)
    return value.to(kept_ND.dtype) if value.dim() == 2 else value.float().unsqueeze(0)


def _product(layer: str, a: Tensor, b: Tensor) -> Tensor:
    scope = torch_xla._XLAC.profiler.scope_pusher(f".{layer}")  # for the names in `tpu_check` and in profiles
    product = a @ b
    del scope
    return product


def _read(normalised_ND: Tensor, weight_1D: Tensor, bias_1D: Tensor) -> Tensor:
    """Return what the product behind a layer norm reads. XLA computes it inside the product that takes it."""
    return (normalised_ND * weight_1D + bias_1D).to(normalised_ND.dtype)


def _activated(h_NF: Tensor, model: ModelConfig) -> Tensor:
    if model.activation == "relu":
        return F.relu(h_NF)
    return F.gelu(h_NF.float(), approximate="tanh").to(h_NF.dtype)
