"""The keys and values of the tokens that a model has read, so that it computes only the new tokens.

Shape suffixes: B texts, T new tokens of each text, S slots that attention looks at, D d_model, N = B * T."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpt2xla.config import ModelConfig


class KVCache:
    """Buffers for `rows` texts of up to seq_length tokens, allocated once. No shape depends on how long the texts are.

    A token's slot in its row is its position, so texts of different lengths lie side by side without padding before them.
    Slots after a row's last token are never looked at, and are overwritten. `zeros(rows, columns)` makes zeros of the type
    of the model's products, on its device."""

    def __init__(self, config: ModelConfig, rows: int, zeros: Callable[[int, int], Tensor]) -> None:
        self.rows, self.seq_length = rows, config.seq_length
        self.layers = [
            tuple(zeros(rows * self.seq_length, config.d_model) for _ in ("keys", "values"))
            for _ in range(config.num_layers)
        ]
        self.dtype = self.layers[0][0].dtype

    def begin(self, starts_B: Tensor, new: int, span: int) -> None:
        """Prepare a pass over `new` tokens per row; the first one of row b has position starts_B[b].

        Attention looks at the first `span` slots, which is above all positions of the pass. Padding after a row's tokens may
        reach past the last slot. Then it is read and stored at the last position. That slot is either still unused, or holds
        the row's last token, which the padding repeats."""
        device = starts_B.device
        positions_BT = (starts_B[:, None] + torch.arange(new, device=device)).clamp(max=self.seq_length - 1)
        first_slots_B1 = torch.arange(self.rows, device=device)[:, None] * self.seq_length
        visible_BTS = torch.arange(span, device=device) <= positions_BT[:, :, None]
        self.positions_BT = positions_BT
        self.slots_N = (first_slots_B1 + positions_BT).flatten()
        # Numbers to add, as attention needs them: here they are made once, not in each layer.
        zeros = torch.zeros((), dtype=self.dtype, device=device)
        self.mask_B1TS = torch.where(visible_BTS, zeros, -torch.inf)[:, None]
        self.span = span

    def append(self, layer: int, k_BTD: Tensor, v_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of one layer in this pass, and return all that attention looks at, each (B, S, D)."""
        for buffer, new_BTD in zip(self.layers[layer], (k_BTD, v_BTD), strict=True):
            buffer.index_copy_(0, self.slots_N, new_BTD.flatten(0, 1))
        k_BSD, v_BSD = (b.view(self.rows, self.seq_length, -1)[:, : self.span] for b in self.layers[layer])
        return k_BSD, v_BSD
