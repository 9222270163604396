"""Traces a step as tpu_compile_check.py does, with names or, if the first argument is `plain`, without; prints its graph."""

import os
import re
import sys

os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4")

from gpt2xla.config import PRESETS, RunConfig, XlaConfig
from gpt2xla.tpu_check import names, traced_step

if sys.argv[1] == "plain":
    names.name_operations = lambda step, open_scope: None
import torch_xla

SIZES = {"d_model": 128, "num_heads": 2, "num_layers": 2, "seq_length": 128, "vocab_size": 512}
STEP = {"train_batch_size": 8, "gradient_accum_step": 2, "mixed_precision": "bf16", "document_mask": True}
FORMS = {"attention": "chunked", "activation_checkpointing": "block", "optim_type": "muon"}
config = RunConfig.from_flat(PRESETS["gpt2"] | SIZES | STEP | FORMS)
_, (_, results), _ = traced_step.trace(config, XlaConfig(use_syncfree_optim=True), "TPU v5 lite", 4)
text = torch_xla._XLAC._get_xla_tensors_hlo([results])
print(re.sub(r", metadata=\{[^}]*\}", "", text))
print(
    *sorted({re.sub(r"\.\d+(?=/|$)", "", n) for n in re.findall(r'op_name="([^"]*)"', text)}), sep="\n", file=sys.stderr
)
