"""The steps of gpu.py that tell right from wrong on a card: its numbers beside the CPU's, and beside its own."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gpu_step import Job, check, report, run

from gpt2xla.config import ModelConfig, RunConfig, TorchConfig
from gpt2xla.logs.peak_flops import named_peak_flops
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Kernels
from gpt2xla.model.loss import IGNORED_LABEL
from gpt2xla.runtime.torch.runtime import TorchRuntime

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20
OPTIONS = [
    "--tokenizer", "bytes", "--vocab-size", 384, "--seq-length", 256, "--d-model", 256, "--num-layers", 4,
    "--num-heads", 4, "--train-batch-size", 8, "--gradient-accum-step", 2, "--eval-batch-size", 8,
    "--valid-steps", 4, "--valid-interval", 10, "--save-interval", 10, "--learning-rate", 1e-3, "--min-lr", 1e-4,
    "--warmup-steps", 5, "--decay-steps", STEPS, "--train-steps", STEPS,
]  # fmt: skip
BF16 = ("--mixed-precision", "bf16")
DETERMINISTIC = (*BF16, "--deterministic")
ONE_PROCESS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")


def environment(job: Job) -> None:
    if not torch.cuda.is_available():
        report("environment", card=None)
        return
    driver = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    try:
        version = subprocess.run(driver, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        version = ""
    properties = torch.cuda.get_device_properties(0)
    report(
        "environment",
        card=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory_GB=properties.total_memory / 1e9,
        driver=version,
        cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        triton=_version("triton"),
        transformers=_version("transformers"),
        peak_flops=named_peak_flops(properties.name),
    )


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def kernels(job: Job) -> None:
    """Gradients of a small model with the kernels that a run on this card takes, and with torch's own, against float64."""
    padded = ModelConfig(vocab_size=50304, seq_length=256, d_model=256, num_layers=2, num_heads=4, vocab_padding=47)
    odd = replace(padded, vocab_size=50257, vocab_padding=0)
    for config, precision, compiled in (
        (padded, "none", False),
        (padded, "bf16", False),
        (padded, "fp16", False),
        (odd, "bf16", False),
        (padded, "bf16", True),
    ):
        generator = torch.Generator().manual_seed(0)
        model = GPT2(config)
        model.init_weights(generator)
        with torch.no_grad():
            for parameter in model.parameters():  # biases that are not zero, scales that are not one
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        ids = torch.randint(0, config.real_vocab_size, (4, config.seq_length), generator=generator)
        labels = ids.roll(-1, 1)
        labels[:, -5:] = IGNORED_LABEL
        options = {
            "train_batch_size": 4, "gradient_accum_step": 1, "mixed_precision": precision, "compile": compiled,
            "loss_chunks": 3,
        }  # fmt: skip
        runtime = TorchRuntime(TorchConfig(), RunConfig.from_flat(options).train)
        exact = _float64_gradients(model, ids, labels)
        plain = _gradients(copy.deepcopy(model).to(runtime.device), runtime, ids, labels, Kernels())
        runtime.setup_model(model)
        forms = {"compiled" if compiled else model.kernels.description.split(", ")[-1]: model.kernels}
        if not compiled:
            check("fused blocks" in forms, f"kernels, {precision}: blocks are fused ({model.kernels.description})")
            if precision != "none":
                forms |= _with_activation_in_products(model.kernels)
        for form, kernels in forms.items():
            model.zero_grad()
            own = _gradients(model, runtime, ids, labels, kernels)
            size = f"{config.vocab_size} ids, {'fp32' if precision == 'none' else precision}, {form}"
            _compare(size, own, plain, exact)


def _with_activation_in_products(kernels: Kernels) -> dict[str, Kernels]:
    from gpt2xla.model.fused.block import fused_block
    from gpt2xla.model.fused.feed_forward import TILES

    return {
        f"activation in products of {tile.rows} x {tile.columns}": replace(
            kernels, block=partial(fused_block, tile=tile)
        )
        for tile in TILES
    }


def _compare(
    name: str, own: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> None:
    """Check that our gradients are as near to float64's as torch's own are."""
    errors = {key: (_error(own[key], exact[key]), _error(plain[key], exact[key])) for key in exact}
    usual = float(np.median([theirs for _, theirs in errors.values()]))
    ratios = {key: mine / max(theirs, usual) for key, (mine, theirs) in errors.items()}
    worst = max(ratios, key=lambda key: ratios[key])
    mine, theirs = errors[worst]
    check(
        ratios[worst] <= 2,
        f"kernels, {name}: gradients off float64's by {mine:.1e} of their norm at worst ({worst}), with torch's own by "
        f"{theirs:.1e} there and {usual:.1e} in the middle",
    )


def _float64_gradients(model: GPT2, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    exact = copy.deepcopy(model).double()
    logits = exact.logits(ids).flatten(0, 1)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    (loss / labels.numel()).backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}


def _gradients(
    model: GPT2, runtime: TorchRuntime, ids: torch.Tensor, labels: torch.Tensor, kernels: Kernels
) -> dict[str, torch.Tensor]:
    model.kernels = kernels
    with runtime.autocast():
        loss, _ = model(runtime.to_device(ids), runtime.to_device(labels))
    runtime.backward(loss / labels.numel())
    scale = runtime.scaler.get_scale() if runtime.scaler else 1.0
    return {"loss": loss.detach().cpu()} | {
        name: p.grad.cpu() / scale for name, p in model.named_parameters() if p.grad is not None
    }


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    error = float((value.double() - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf


class Runs:
    """Small runs of run_pretrain.py side by side, as many as there are cores for: each is too small to keep a card busy."""

    def __init__(self, job: Job) -> None:
        self.end = time.monotonic() + job.seconds - 20  # with time to compare
        self.folder, self.data = job.work / "runs", data_folder(job)
        self.folder.mkdir(exist_ok=True)
        cores = len(os.sched_getaffinity(0))
        self.at_once, self.cpu_threads = max(2, cores * 3 // 4), max(1, min(4, cores // 4))
        self.failed: set[str] = set()
        self.waiting: list[tuple[str, list[str], dict[str, str]]] = []

    def add(self, name: str, *options: Any, program: tuple[str, ...] = (sys.executable,), cpu: bool = False) -> None:
        command = [
            *program,
            ROOT / "run_pretrain.py",
            "--train-dir",
            self.data / "train",
            "--valid-dir",
            self.data / "test",
        ]
        command += [*OPTIONS, "--checkpoints-dir", self.folder / name, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.cpu_threads), "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        environment |= {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
        self.waiting.append((name, [str(part) for part in command], environment))

    def make(self) -> None:
        """Make the runs that were added, and kill those that take too long."""
        running: dict[str, subprocess.Popen[Any]] = {}
        while self.waiting or running:
            while self.waiting and len(running) < self.at_once:
                name, command, environment = self.waiting.pop(0)
                with (self.folder / f"{name}.log").open("a") as log:
                    running[name] = subprocess.Popen(
                        command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT
                    )
            time.sleep(0.1)
            is_late = time.monotonic() > self.end
            for name, process in list(running.items()):
                code = process.poll()
                if code is None and is_late:
                    process.kill()
                if code is not None or is_late:
                    del running[name]
                    if code != 0:
                        ended = "too slow" if code is None else f"exit code {code}"
                        log = self.log(name)
                        errors = [line for line in log if "rror" in line and "error_file" not in line]
                        self._fail(name, f"{ended}: {' | '.join((errors or log)[-3:])[-400:]}")
            while self.waiting and is_late:
                self._fail(self.waiting.pop(0)[0], "not started: no time")

    def _fail(self, name: str, why: str) -> None:
        self.failed.add(name)
        check(False, f"{name}: {why}")

    def log(self, name: str) -> list[str]:
        file = self.folder / f"{name}.log"
        return file.read_text(errors="replace").strip().splitlines() if file.exists() else []

    def values(self, name: str, key: str) -> dict[int, float]:
        """Return a run's values by update."""
        file = self.folder / name / "metrics.jsonl"
        lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
        return {line["step"]: line[key] for line in lines if line.get(key) is not None}

    def apart(self, name: str, other: str, key: str = "loss") -> float:
        """Return the largest difference between two runs; infinite if one of them is shorter."""
        a, b = self.values(name, key), self.values(other, key)
        if not b or a.keys() != b.keys():
            return math.inf
        return max(abs(a[step] - b[step]) for step in b)

    def compare(self, name: str, other: str, allowed: float, key: str = "loss") -> None:
        if {name, other} & self.failed:
            return
        apart = self.apart(name, other, key)
        check(
            apart <= allowed,
            f"{name}: {key} within {apart:.1e} of {other} over {STEPS} updates ({allowed:.0e} allowed)",
        )


def data_folder(job: Job) -> Path:
    """Return a folder with train/ and test/, of ids below 251 that can be learnt: each is mostly the one before plus 1."""
    data = job.work / "data"
    random = np.random.default_rng(0)
    for split, size in (("train", 3_000_000), ("test", 60_000)):
        if not (data / split).exists():
            (data / split).mkdir(parents=True)
            jumps = np.where(random.random(size) < 0.8, 1, random.integers(0, 251, size))
            np.save(data / split / "000.npy", (np.cumsum(jumps) % 251).astype(np.uint16))
    return data


def side_by_side(job: Job) -> None:
    """The card's losses beside the CPU's in fp32."""
    runs = Runs(job)
    runs.add("cpu", "--no-compile", cpu=True)
    runs.add("cpu_muon", "--no-compile", "--optim-type", "muon", cpu=True)
    runs.add("fp32", "--mixed-precision", "none")
    runs.add("tf32", "--mixed-precision", "none", "--matmul-precision", "high")
    runs.add("bf16", *BF16)
    runs.add("fp16", "--mixed-precision", "fp16")
    runs.add("muon", *BF16, "--optim-type", "muon")
    runs.add("checkpointed", *BF16, "--activation-checkpointing", "block")
    runs.add("fp32_compiled", "--compile", "--mixed-precision", "none")
    runs.add("bf16_compiled", "--compile", *BF16)
    runs.add("dropout", "--compile", *BF16, "--dropout", 0.1)
    runs.make()
    for name, loss, norm in (
        ("fp32", 2e-4, 1e-3),
        ("fp32_compiled", 2e-4, 1e-3),
        ("tf32", 2e-3, 2e-2),
        ("bf16", 1e-2, 2e-1),
        ("bf16_compiled", 1e-2, 2e-1),
        ("fp16", 1e-2, 1e-1),
    ):
        runs.compare(name, "cpu", loss)
        runs.compare(name, "cpu", loss, "valid_loss")
        runs.compare(name, "cpu", norm, "grad_norm")
    runs.compare("checkpointed", "bf16", 1e-2)
    runs.compare("muon", "cpu_muon", 2e-2)
    runs.compare("dropout", "cpu", 0.5)  # draws other numbers


def repeats(job: Job) -> None:
    """The same command again, and stopped and resumed, to the last bit; one process under torchrun, beside none."""
    runs = Runs(job)
    runs.add("first", *DETERMINISTIC)
    runs.add("again", *DETERMINISTIC)
    runs.add("resumed", *DETERMINISTIC, "--train-steps", STEPS // 2)
    runs.add("alone", *BF16)
    for name, options in (("ddp", ()), ("zero1", ("--zero1",)), ("fsdp", ("--fsdp",))):
        runs.add(name, *BF16, *options, program=ONE_PROCESS)
    runs.make()
    runs.add("resumed", *DETERMINISTIC)
    runs.make()
    runs.compare("again", "first", 0)
    runs.compare("resumed", "first", 0)
    for name in ("ddp", "zero1", "fsdp"):
        runs.compare(name, "alone", 2e-2)
        said = [line for line in runs.log(name) if re.search(r"[Ww]arn|NCCL|destroy|barrier", line)]
        report("note", text=f"{name} of one process over NCCL warns of {said[:4] or 'nothing'}")
    if {"first", "resumed"} & runs.failed:
        return
    weights = [_weights(runs.folder / name) for name in ("first", "resumed")]
    same = bool(weights[0]) and weights[0].keys() == weights[1].keys()
    same = same and all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])
    check(same, "resumed: its weights are those of first to the last bit")


def _weights(run_folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    file = run_folder / f"step-{STEPS:08d}" / "model.safetensors"
    return load_file(file) if file.exists() else {}


def out_of_memory(job: Job) -> None:
    """What a run that does not fit says, and how long it takes to find out."""
    data = data_folder(job)
    command = [sys.executable, ROOT / "run_pretrain.py", "--train-dir", data / "train", "--valid-dir", data / "test"]
    command += ["--checkpoints-dir", job.work / "out_of_memory", "--tokenizer", "bytes", "--vocab-size", 50304, *BF16]
    command += ["--train-batch-size", 1024, "--gradient-accum-step", 1, "--train-steps", 2, "--no-compile"]
    start = time.monotonic()
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=job.work)
    said = (ended.stderr.strip().splitlines() or ["nothing"])[-1]
    seconds = time.monotonic() - start
    advises = ended.returncode == 1 and "is the same 1,024 sequences per update" in said
    check(advises, f"out of memory, after {seconds:.0f} s: {said[-400:]}")


if __name__ == "__main__":
    run(
        {
            "environment": environment,
            "kernels": kernels,
            "side-by-side": side_by_side,
            "repeats": repeats,
            "out-of-memory": out_of_memory,
        }
    )
