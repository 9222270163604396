"""Which of our Pallas kernels a run on a TPU uses. Imports neither torch_xla nor, unless it has to, jax."""

from __future__ import annotations

from gpt2xla.config import ModelConfig, TrainConfig
from gpt2xla.runtime.xla.versions import installed, release_for, why_no_kernels


def why_no_flash_attention(device_kind: str, model: ModelConfig) -> str | None:
    """Return what keeps the attention kernels from running, or None if nothing does."""
    if not device_kind.startswith("TPU") or device_kind.startswith("TPU v2"):
        return "it needs a TPU v3 or later"
    versions = installed(("torch_xla", "jax"))
    if reason := why_no_kernels(release_for(versions), versions.get("jax")):
        return reason
    from gpt2xla.model.pallas_attention_shape import Shape

    head_size, length = model.d_model // model.num_heads, model.seq_length
    if not Shape(1, length, model.num_heads, head_size, device_kind).supported:
        return (
            f"heads of {head_size} columns and --seq-length {length} do not suit it (it takes heads of 32, 64 or 128, and "
            "multiples of 128 tokens, up to 1024 or, with 64 columns and from v4 on, 2048)"
        )
    return None


def blocks_are_kernels(device_kind: str, model: ModelConfig, train: TrainConfig, *, spmd: bool) -> bool:
    """Whether kernels make the products of a block in this run.

    They were written for v5e and v6e: v3 multiplies no bf16, and a chip of v4 or v5p has two cores, of which they would use
    one."""
    if device_kind not in ("TPU v5 lite", "TPU v6 lite") or spmd or model.dropout:
        return False
    if train.mixed_precision not in ("auto", "bf16"):  # auto is bf16 on these
        return False
    if train.activation_checkpointing != "none" or train.attention not in ("auto", "flash"):
        return False
    if why_no_flash_attention(device_kind, model):
        return False
    from gpt2xla.model.pallas_block import Rows

    return Rows(model.seq_length, model.d_model, model.d_ff, model.activation, model.layer_norm_eps).supported
