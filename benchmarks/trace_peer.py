"""The training step of another trainer's GPT-2, traced as `gpt2xla.tpu_check.traced_step` traces ours (124M, bf16, 8
replicas).

The peer is minhnguyent546/pre-training-gpt2, fetched by the user; this calls its model with the optimizer and clipping of
its XLA runner. Arguments: the peer's folder, sequences per device, and a folder for the graph.
"""

import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path

from gpt2xla.tpu_check.traced_step import dump_flags, leave_with_graph

VOCABULARY, LENGTH, REPLICAS = 50304, 1024, 8


def main() -> None:
    peer, sequences, output = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(REPLICAS)}
    os.environ["XLA_FLAGS"] = dump_flags(output)
    import torch
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.runtime as xr
    from torch_xla.amp import syncfree

    sys.path.insert(0, str(peer))
    from gpt2.model import GPT, GPTConfig  # the peer's

    device = torch.device("xla:0")
    names = [f"xla:{number}" for number in range(REPLICAS)]
    torch_xla._XLAC._xla_set_replication_devices(torch_xla._XLAC._xla_real_devices(names))
    xr._WORLD_SIZE = REPLICAS
    config = GPTConfig(vocab_size=VOCABULARY, seq_length=LENGTH, num_layers=12, num_heads=12, d_model=768, d_ff=3072)
    model = GPT(config).to(device)
    model.tie_weights()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = syncfree.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), eps=1e-8)
    criterion = torch.nn.CrossEntropyLoss()

    def step(batch: int) -> list[torch.Tensor]:
        ids, labels = (torch.randint(0, 50257, (batch, LENGTH)).to(device) for _ in range(2))
        with torch.autocast("xla", dtype=torch.bfloat16):
            logits = model(ids)
            loss = criterion(logits.view(-1, VOCABULARY), labels.view(-1))
        loss.backward()
        xm.reduce_gradients(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return [ids, labels, loss.detach()]

    seconds = []
    for number in range(5):  # the first creates the optimizer's state
        torch_xla._XLAC._clear_pending_irs(str(device))
        start = time.perf_counter()
        kept = step(sequences if number else 1)
        seconds.append(time.perf_counter() - start)
    (output / "trace.json").write_text(json.dumps({"trace_ms": round(statistics.median(seconds[1:]) * 1000, 1)}))
    threading.Thread(target=leave_with_graph, args=(output,), daemon=True).start()
    torch_xla._XLAC._xla_sync_live_tensors(str(device), names, True)
    raise AssertionError(f"{kept} was compiled before its graph could be caught")


if __name__ == "__main__":
    main()
