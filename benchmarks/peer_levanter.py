"""Levanter's training step of its `gpt2_small`, lowered by its own `Trainer`: data parallel, with its checkpointing.

`tpu_peers.py` calls it with the peers' Python.
"""

import functools
from typing import Any

from peer_lowering import LENGTH, SEQUENCES, VOCABULARY, arguments, devices_of, write


def main() -> None:
    _, topology, number, folder, _ = arguments()
    import equinox
    import haliax
    import jax
    import jax.numpy as jnp
    import jmp
    import levanter.tracker
    import numpy as np
    from haliax.partitioning import ResourceAxis
    from levanter.layers.attention import AttentionBackend, AttentionMask
    from levanter.models.gpt2 import Gpt2Config
    from levanter.models.lm_model import LmExample, compute_next_token_loss
    from levanter.optim import AdamConfig
    from levanter.trainer import Trainer, TrainerConfig
    from levanter.trainer_state import TrainerState

    accept_shapes()
    axes = (ResourceAxis.REPLICA, ResourceAxis.DATA, ResourceAxis.MODEL)
    mesh = jax.sharding.Mesh(np.array(devices_of(topology, number)).reshape(1, number, 1), axes)
    # The kernel is named: the default asks the local device, a CPU here. Checkpointing is its default.
    config = Gpt2Config(seq_len=LENGTH, attn_backend=AttentionBackend.SPLASH)
    trainer_config = TrainerConfig(
        id="table",
        mp=jmp.get_policy("p=f32,c=bfloat16"),
        train_batch_size=SEQUENCES * number,
        num_train_steps=20000,
        fsdp_axis=None,
        load_checkpoint=False,
        tracker=levanter.tracker.NoopConfig(),
    )
    trainer_config.__dict__["device_mesh"] = mesh  # a cached property, which would ask for the local devices
    optimizer = AdamConfig(learning_rate=6e-4, weight_decay=0.1).build(20000)
    trainer = Trainer(trainer_config, optimizer, functools.partial(compute_next_token_loss, logsumexp_weight=0.0))

    def start(key: Any) -> Any:
        model = config.build(haliax.Axis("vocab", VOCABULARY), key=key)
        return TrainerState.init(optimizer, model, key=key, is_trainable=True, mp=trainer_config.mp)

    def example() -> Any:
        axes = (haliax.Axis("batch", SEQUENCES * number), config.Pos)
        tokens, counted = haliax.zeros(axes, dtype=jnp.int32), haliax.zeros(axes, dtype=jnp.float32)
        return LmExample(tokens=tokens, loss_mask=counted, attn_mask=AttentionMask.causal())

    with trainer:
        state = placed(equinox.filter_eval_shape(start, jax.random.PRNGKey(0)), trainer.parameter_axis_mapping, mesh)
        batch = placed(equinox.filter_eval_shape(example), trainer.compute_axis_mapping, mesh)
        lowered = trainer._jit_train_step_fn_no_hook.lower(state, (batch,), {})
    write(getattr(lowered, "lowered", lowered), folder)


def accept_shapes() -> None:
    """Let haliax place arrays of which only the shape is known."""
    import haliax.partitioning
    import jax

    is_array = haliax.partitioning.is_array
    haliax.partitioning.is_array = lambda x: isinstance(x, jax.ShapeDtypeStruct) or is_array(x)


def placed(tree: Any, mapping: Any, mesh: Any) -> Any:
    """Return the shapes of `tree` with the shardings that Levanter gives them."""
    import haliax
    import haliax.partitioning
    import jax

    def named(x: Any) -> bool:
        return isinstance(x, haliax.NamedArray)

    def place(leaf: Any, sharding: Any) -> Any:
        if named(leaf):
            sharding = sharding.array if named(sharding) else sharding
            array = jax.ShapeDtypeStruct(leaf.array.shape, leaf.array.dtype, sharding=sharding)
            return haliax.NamedArray(array, leaf.axes)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
        return leaf

    shardings = haliax.partitioning.infer_resource_partitions(tree, mapping, preserve_existing_shardings=False)
    return jax.tree_util.tree_map(place, tree, shardings, is_leaf=named)


if __name__ == "__main__":
    main()
