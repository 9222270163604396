"""MaxText's training step of a 124M GPT-2, lowered by its own `train_compile`: its `gpt3` block at GPT-2's sizes.

`tpu_peers.py` calls it with the peers' Python. Options that differ from `OPTIONS` follow the arguments, as KEY=VALUE.
"""

import tempfile

from peer_lowering import LENGTH, SEQUENCES, VOCABULARY, arguments, devices_of, write

OPTIONS = {
    # the model
    "decoder_block": "gpt3",
    "base_num_decoder_layers": 12,
    "base_emb_dim": 768,
    "base_mlp_dim": 3072,
    "base_num_query_heads": 12,
    "base_num_kv_heads": 12,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "trainable_position_size": LENGTH,
    "mlp_activations": '["gelu"]',
    "normalization_layer_epsilon": 1e-5,
    "logits_via_embedding": True,
    "normalize_embedding_logits": False,
    "use_iota_embed": False,
    "fused_qkv": True,
    "enable_dropout": False,
    # the step
    "max_target_length": LENGTH,
    "per_device_batch_size": SEQUENCES,
    "dtype": "bfloat16",
    "weight_dtype": "float32",
    "logits_dot_in_fp32": False,
    "attention": "flash",
    "packing": False,
    "opt_type": "adamw",
    "adam_b1": 0.9,
    "adam_b2": 0.95,
    "adam_eps": 1e-8,
    "adam_weight_decay": 0.1,
    "gradient_clipping_threshold": 1.0,
    "steps": 20000,
    # where and how it runs
    "ici_data_parallelism": -1,
    "ici_fsdp_parallelism": 1,
    "compile_topology_num_slices": 1,
    "dataset_type": "synthetic",
    "run_name": "table",
    "enable_checkpointing": False,
    "enable_goodput_recording": False,
    "monitor_goodput": False,
}
SAME_NUMBER = {8: "v5e-8", 4: "v4-8"}  # MaxText knows no v3; a name of its own tells it only the number of devices


def main() -> None:
    checkout, topology, number, folder, changes = arguments()
    import jax
    from flax.linen import partitioning
    from MaxText import maxtext_utils, pyconfig, train, train_compile

    jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # as train_compile.main does
    with tempfile.TemporaryDirectory() as outputs:
        options = OPTIONS | {"compile_topology": SAME_NUMBER[number], "base_output_directory": outputs}
        options |= dict(option.split("=", 1) for option in changes)
        base = str(checkout / "src" / "MaxText" / "configs" / "base.yml")
        config = pyconfig.initialize(["train_compile.py", base, *(f"{k}={v}" for k, v in options.items())])
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config, devices_of(topology, number)), config.mesh_axes)
    inputs, keywords, shardings, model = train_compile.get_shaped_inputs(mesh, config)
    batch = maxtext_utils.get_input_data_sharding(config, mesh)
    step, before, after, static, donated = maxtext_utils.get_functional_train_with_signature(
        train.train_step, batch, shardings, model, config
    )
    jitted = jax.jit(step, in_shardings=before, out_shardings=after, static_argnums=static, donate_argnums=donated)
    with mesh, partitioning.axis_rules(config.logical_axis_rules):
        write(jitted.lower(*inputs, **keywords), folder)


if __name__ == "__main__":
    main()
