"""GPT-2 (Radford et al. 2019), for any device, with Hugging Face's parameter names.

Shape suffixes: B sequences, T tokens, D d_model, V vocabulary."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2xla.config import ModelConfig
from gpt2xla.model.arithmetic import compute_dtype, linear
from gpt2xla.model.attention import sdpa_attention
from gpt2xla.model.documents import document_mask, document_starts
from gpt2xla.model.embedding_noise import embedding_noise
from gpt2xla.model.kernels import Kernels
from gpt2xla.model.kv_cache import KVCache
from gpt2xla.model.loss import IGNORED_LABEL, mask_padding


class GPT2(nn.Module):
    """The language model.

    Unless `config.tie_weights` is off, the output head uses `wte.weight`. One parameter under two names would
    become two when the model moves to XLA."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = _embedding(config.vocab_size, config.d_model)
        self.wpe = _embedding(config.seq_length, config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps, bias=config.bias)
        if not config.tie_weights:
            self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self.kernels = Kernels()  # how the parts are computed; a runtime sets its own
        # The id that begins a document, if attention must stay within documents (--document-mask). Generation with a cache
        # is for single documents, and does not look at it.
        self.end_of_text: int | None = None
        self.neftune_alpha = 0.0  # of the noise with which `forward` trains (--neftune-alpha)

    def forward(self, ids_BT: Tensor, labels_BT: Tensor, noise_seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the summed token loss (nats, fp32) and the number of tokens that it sums over, both 0-d.

        `labels_BT[b, t]` is the token that follows `ids_BT[b, t]`, or IGNORED_LABEL. Without a seed of --neftune-alpha's
        noise there is none: no other method of the model has any."""
        padding = self.config.vocab_padding
        loss = self.kernels.cross_entropy(
            self.hidden(ids_BT, noise_seed=noise_seed), self.head_weight, labels_BT, padding
        )
        return loss, (labels_BT != IGNORED_LABEL).sum()

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Return next-token logits (B, T, V), which are -inf for ids that only pad the vocabulary."""
        return self._head(self.hidden(ids_BT))

    def next_logits(self, ids_BT: Tensor, starts_B: Tensor, counts_B: Tensor, cache: KVCache, span: int) -> Tensor:
        """Add new tokens to `cache` and return the logits (B, V) of the token that follows them in each row.

        Row b has starts_B[b] tokens in the cache; ids_BT[b] holds counts_B[b] more, then padding that repeats the last of
        them. Padding past the last slot is stored in that slot, which holds the same token. `span`: see `KVCache.begin`."""
        cache.begin(starts_B, ids_BT.shape[1], span)
        x_BTD = self.hidden(ids_BT, cache)
        last_B11 = (counts_B - 1).clamp(min=0)[:, None, None]
        x_BD = x_BTD.gather(1, last_B11.expand(-1, 1, x_BTD.shape[2]))[:, 0]
        return self._head(x_BD)

    def _head(self, x: Tensor) -> Tensor:
        return mask_padding(self.kernels.head(x, self.head_weight), self.config.vocab_padding)

    def hidden(self, ids_BT: Tensor, cache: KVCache | None = None, noise_seed: Tensor | None = None) -> Tensor:
        """Return what the output head reads (B, T, D)."""
        positions = cache.positions_BT if cache else torch.arange(ids_BT.shape[1], device=ids_BT.device)
        documents = None
        if self.end_of_text is not None and not cache:
            documents = document_starts(ids_BT, self.end_of_text)
            positions = positions - documents
        x_BTD = self.wte(ids_BT)
        if noise_seed is not None:
            x_BTD = x_BTD + embedding_noise(ids_BT, noise_seed, self.neftune_alpha, self.config.d_model)
        x_BTD = self.drop(x_BTD + self.wpe(positions))
        if documents is not None and not (self.kernels.attention or self.kernels.projected_attention):
            documents = document_mask(documents, compute_dtype(x_BTD))  # once, not in each layer
        for layer, block in enumerate(self.h):
            x_BTD = block(x_BTD, self.kernels, None, cache, layer) if cache else self._run(block, x_BTD, documents)
        return self.kernels.layer_norm(x_BTD, self.ln_f)

    def _run(self, block: nn.Module, x_BTD: Tensor, documents: Tensor | None) -> Tensor:
        compiled, checkpoint = self.kernels.compiled, self.kernels.checkpoint
        # Each other length would be compiled again.
        call = partial(compiled, block) if compiled and x_BTD.shape[1] == self.config.seq_length else block
        if checkpoint and torch.is_grad_enabled():
            return checkpoint(call, x_BTD, self.kernels, documents)
        return call(x_BTD, self.kernels, documents)

    @property
    def computation(self) -> str:
        """How the model is computed, in words."""
        mask = ", document mask" if self.end_of_text is not None else ""
        return (
            self.kernels.description + mask + (f", NEFTune alpha {self.neftune_alpha:g}" if self.neftune_alpha else "")
        )

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix (V, D)."""
        return self.wte.weight if self.config.tie_weights else self.lm_head.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw GPT-2's initial weights: N(0, 0.02) for matrices and embeddings, zero for biases, one for layer norms.

        Projections into the residual stream are divided by sqrt(2 * layers), so its variance does not grow with depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                depth = 2 * self.config.num_layers if name.endswith("c_proj.weight") else 1
                parameter.normal_(0.0, 0.02 / math.sqrt(depth), generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def num_parameters(self) -> int:
        """Return the number of parameters, including those that pad the vocabulary."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Return the floating-point operations of forward and backward per trained token: 6 * parameters + 12 * layers *
        D * T (Chowdhery et al. 2022, PaLM, appendix B). Embeddings that are only looked up do not count."""
        c = self.config
        matrices = self.num_parameters() - self.wpe.weight.numel() - (0 if c.tie_weights else self.wte.weight.numel())
        return 6 * matrices + 12 * c.num_layers * c.d_model * c.seq_length


def blank(config: ModelConfig) -> GPT2:
    """Return the model on the CPU, with memory for weights that are still to be written.

    Neither drawing weights on the meta device nor `to_empty` is used: both import half of torch's compiler, for a second."""
    with torch.device("meta"):
        model = GPT2(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
    return model


class Linear(nn.Linear):
    """torch's, without first weights on the meta device, and with `linear` as its function."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _embedding(rows: int, columns: int) -> nn.Embedding:
    weight = torch.empty(rows, columns)  # as above
    return nn.Embedding(rows, columns, _weight=weight if weight.is_meta else weight.normal_())


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTD: Tensor,
        kernels: Kernels,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Return x after the block. `documents`: see `Kernels.attention`."""
        if kernels.block and not cache:
            return kernels.block(self, x_BTD, documents)
        x_BTD = x_BTD + self.attn(kernels.layer_norm(x_BTD, self.ln_1), kernels, documents, cache, layer)
        return x_BTD + self.mlp(kernels.layer_norm(x_BTD, self.ln_2))


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.c_attn = Linear(config.d_model, 3 * config.d_model, bias=config.bias)
        self.c_proj = Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(
        self, x_BTD: Tensor, kernels: Kernels, documents: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        if kernels.projected_attention and not cache:
            weight, bias = self.c_attn.weight, self.c_attn.bias
            return self._output(kernels.projected_attention(x_BTD, weight, bias, self.num_heads, documents))
        if kernels.separate_qkv:
            biases = [None] * 3 if self.c_attn.bias is None else self.c_attn.bias.chunk(3)
            parts = zip(self.c_attn.weight.chunk(3), biases, strict=True)
            q_BTD, k_BTD, v_BTD = (linear(x_BTD, weight, bias) for weight, bias in parts)
        else:
            q_BTD, k_BTD, v_BTD = self.c_attn(x_BTD).chunk(3, dim=-1)
        if cache:
            y_BTD = sdpa_attention(q_BTD, *cache.append(layer, k_BTD, v_BTD), self.num_heads, mask_B1TS=cache.mask_B1TS)
        elif kernels.attention:
            y_BTD = kernels.attention(q_BTD, k_BTD, v_BTD, self.num_heads, documents)
        else:
            dropout = self.dropout if self.training else 0.0
            y_BTD = sdpa_attention(q_BTD, k_BTD, v_BTD, self.num_heads, dropout, documents)
        return self._output(y_BTD)

    def _output(self, y_BTD: Tensor) -> Tensor:
        return F.dropout(self.c_proj(y_BTD), self.dropout, self.training)


class MLP(nn.Module):
    """The feed-forward layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.dropout = config.dropout
        self.c_fc = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.c_proj = Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = self.c_fc(x_BTD)
        if self.activation == "relu":
            x = F.relu(x)
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu-tanh" else "none")
        return F.dropout(self.c_proj(x), self.dropout, self.training)
