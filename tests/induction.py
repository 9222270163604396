"""A GPT-2 whose heads are known: it copies, as the induction heads of Elhage et al. 2021 ("A Mathematical Framework for
Transformer Circuits"). Its first layer looks at the token before; its second looks for what followed the same token earlier
in the text, and expects that. So repetition becomes certain, and nothing else does."""

import math

import torch
from torch import nn

from gpt2xla.config import ModelConfig
from gpt2xla.model.gpt2 import GPT2

_SHARP = 40.0  # what a score exceeds the others by
_SURE = 12.0  # the logit of a token that is expected


def induction_model(vocab_size: int, seq_length: int) -> GPT2:
    """The residual stream has four parts, of ones and zeros: the token, its position, the token before, what is expected."""
    width = 3 * vocab_size + seq_length
    model = GPT2(ModelConfig(vocab_size, seq_length, width, 2, 1, d_ff=8, activation="relu", tie_weights=False))
    token = torch.arange(vocab_size)
    position = vocab_size + torch.arange(seq_length)
    before, expected = vocab_size + seq_length + token, 2 * vocab_size + seq_length + token
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.wte.weight[token, token] = 1.0
        model.wpe.weight[torch.arange(seq_length), position] = 1.0
        (first, second), sharp = model.h, _SHARP * math.sqrt(width)
        for block, ones in ((first, 2), (second, 3)):
            _undo(block.ln_1, ones)
            block.attn.c_proj.weight.copy_(torch.eye(width))
        query, key, value = first.attn.c_attn.weight.chunk(3)
        query[position[:-1], position[1:]] = sharp
        key[position, position] = 1.0
        value[before, token] = 1.0
        query, key, value = second.attn.c_attn.weight.chunk(3)
        query[token, token] = sharp
        key[token, before] = 1.0
        value[expected, token] = 1.0
        # No token is before the first one, which looked at itself.
        second.attn.c_attn.bias[position[0]] = sharp
        key[position[0], position[0]] = -2.0
        _undo(model.ln_f, 4)
        model.lm_head.weight[token, expected] = _SURE
    return model


def _undo(norm: nn.LayerNorm, ones: int) -> None:
    """Give `norm` the weights with which it returns its input, if that is `ones` ones among zeros."""
    mean = ones / norm.weight.numel()
    norm.weight.fill_(math.sqrt(mean - mean**2 + norm.eps))
    norm.bias.fill_(mean)
