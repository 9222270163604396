"""Traces the training step into the graph that a TPU's compiler gets, on a machine without a TPU. Nothing is executed.

Run it as a program, `python -m gpt2xla.tpu_check.traced_step REQUEST.json`: it sets the process's environment, and exits
when the graph has been written, before a CPU compiles it."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

_TIMED_STEPS = 5


def main(request: dict[str, Any]) -> None:
    """Write the graph and trace.json to the folder that `request` names as output, and exit.

    It also holds config (flat options), options (the runner's), device_kind and replicas."""
    output = Path(request["output"])
    os.environ["PJRT_DEVICE"] = "CPU"
    os.environ["CPU_NUM_DEVICES"] = str(request["replicas"])
    os.environ["XLA_FLAGS"] = dump_flags(output)

    from gpt2xla.config import RunConfig, XlaConfig

    config = RunConfig.from_flat({k: tuple(v) if isinstance(v, list) else v for k, v in request["config"].items()})
    options = XlaConfig(**request["options"])
    runtime, _alive, report = trace(config, options, request["device_kind"], request["replicas"])
    (output / "trace.json").write_text(json.dumps(report))
    threading.Thread(target=leave_with_graph, args=(output,), daemon=True).start()
    runtime.compile_pending()
    raise AssertionError("the step was compiled before its graph could be caught")


def dump_flags(output: Path) -> str:
    """Return XLA_FLAGS that write a graph below `output` before it is compiled, buffer donors included."""
    return f"--xla_dump_to={output} --xla_dump_hlo_as_proto --xla_dump_hlo_module_re=.*SyncTensorsGraph.*"


def trace(config: Any, options: Any, device_kind: str, replicas: int) -> tuple[Any, Any, dict[str, Any]]:
    """Trace some steps, and leave the last one pending.

    Return the runtime, what must stay alive until the graph is caught, and the report of what tracing cost the host."""
    import torch

    from gpt2xla.data.batch_plan import BatchPlan
    from gpt2xla.model.gpt2 import GPT2
    from gpt2xla.runtime.precision import label
    from gpt2xla.tpu_check.names import name_operations
    from gpt2xla.tpu_check.placeholder_runtime import TracingRuntime, TracingSpmdRuntime, open_scope
    from gpt2xla.training.train_step import TrainStep

    kind = TracingSpmdRuntime if options.spmd else TracingRuntime
    runtime = kind(options, config.train, device_kind, replicas)
    with torch.device("meta"):
        model = GPT2(config.model)
    model.end_of_text = 0 if config.train.document_mask else None  # any id makes the same graph
    step = TrainStep(config, runtime, model, None)
    phase = BatchPlan.of(config.train, runtime.devices).phases[0]
    batches = runtime.batches(phase.batch_size, config.model.seq_length)
    seconds = []
    for number in range(_TIMED_STEPS + 2):
        if number > _TIMED_STEPS:
            os.environ["XLA_HLO_DEBUG"] = "1"  # names in the graph; they take time, so not before
            name_operations(step, open_scope)
        runtime.forget_pending()
        start = time.perf_counter()
        runtime.begin_step(step)
        loss, grad_norm, _ = step(batches, number, phase, phase.sequences * config.model.seq_length)
        results = torch.stack([loss, grad_norm])  # alive until the graph is caught, as its results
        seconds.append(time.perf_counter() - start)
    report = {
        "trace_ms": round(median(seconds[1:-1]) * 1000, 1),
        "parameters": model.num_parameters(),
        "kernels": model.computation,
        "precision": label(runtime.precision.name),
    }
    return runtime, (step, results), report


def leave_with_graph(output: Path) -> None:
    """Exit when the graph has been written.

    Meanwhile a CPU's compiler is at work. At a kernel made for TPUs it would abort the process, which is no fault."""
    while True:
        time.sleep(0.1)
        if graph := graph_in(output):
            size = graph.stat().st_size
            time.sleep(0.3)
            if size == graph.stat().st_size:
                os._exit(0)


def graph_in(output: Path) -> Path | None:
    """Return the file of the graph that was written there, an HloProto; None if there is none yet."""
    return next((f for f in output.glob("*before_optimizations*.pb") if f.stat().st_size), None)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
