"""The trainers that `train.py` compares, each in a process of its own: it waits for a line with a number of updates on its
standard input, makes them, and answers with their losses and the seconds they took. The line "profile" asks for a profile.

All begin with the same weights and see the same tokens, at the same rates: what differs is the work per update.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.config import PRESETS, ModelConfig, OptimConfig, RunConfig, TorchConfig
from gpt2xla.data.batch_plan import Phase
from gpt2xla.data.windows import Batch
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.optim.optimizer import ADAM_EPS, parameter_groups
from gpt2xla.optim.schedule import learning_rate
from gpt2xla.runtime.precision import DTYPES

# GPT-3's warm-up for this size. Where rates rise ten times as fast, gradients of single sequences soon grow so steep that
# any two roundings of one run part.
OPTIM = {"learning_rate": 6e-4, "warmup_steps": 715, "decay_steps": 10_000}
CLIP, BETAS, DECAY = 1.0, (0.9, 0.95), 0.1
Update = Callable[[Tensor, Tensor], Tensor]

SMALL = {"num_layers": 6, "d_model": 384, "num_heads": 6, "seq_length": 256}
# Name: model, sequences per update on a CPU and on a GPU.
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "6x384": (SMALL, 16, 256),
    "124M": (PRESETS["gpt2"], 2, 64),
    "355M": (PRESETS["gpt2-medium"], 1, 32),
    "774M": (PRESETS["gpt2-large"], 1, 16),
    "1.5B": (PRESETS["gpt2-xl"], 1, 8),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be trained: `folder` holds the first weights, `peer` the other trainer's source, if it is one."""

    folder: Path
    model: ModelConfig
    batch: int
    precision: str
    device: torch.device
    peer: Path | None
    compile: bool
    tuned: bool

    def tokens(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels (batch, seq_length) of update `step`, on the host: ids that are frequent as words are (Zipf's
        law), each followed by one that it decides half of the time, so that there is something to learn."""
        rng = np.random.default_rng(step)
        shape, ids = (self.batch, self.model.seq_length + 1), self.model.vocab_size - 47  # those beyond only pad
        drawn = np.minimum((rng.pareto(1.0, shape) * 4).astype(np.int64), ids - 1)
        follows = rng.random(shape) < 0.5
        for t in range(1, shape[1]):
            drawn[:, t] = np.where(follows[:, t], drawn[:, t - 1] * 31 % 997, drawn[:, t])
        tokens = torch.from_numpy(drawn)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def autocast(self) -> Any:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype=dtype) if self.precision != "none" else nullcontext()


def draw_weights(folder: Path, options: dict[str, Any]) -> ModelConfig:
    """Write the first weights of a model to `folder` and return its shape, which all contenders can have."""
    config = ModelConfig(
        **{**options, "vocab_size": 50304, "activation": "gelu-exact"}
    )  # nanoGPT computes the exact GELU
    with torch.device("meta"):  # torch would draw weights of its own first
        model = GPT2(config)
    model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(0))
    hf.save_model(folder, config, model.state_dict(), GenerationSettings.ending_with(None))
    return config


def flops_per_token(config: ModelConfig) -> int:
    with torch.device("meta"):
        return GPT2(config).flops_per_token()


def folder_of_model(path: Path) -> Path:
    """Return the folder of a nanoGPT's model.py, of which `path` is either. Raises ValueError if there is none."""
    folder = path.parent if path.name == "model.py" else path
    if not (folder / "model.py").is_file():
        raise ValueError(f"{path}: there is no model.py; name nanoGPT's")
    return folder


def rate(step: int) -> float:
    return learning_rate(OptimConfig(**OPTIM), 0, step)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("contender", "folder", "precision", "device", "peer"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tuned", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.tuned:
        torch.set_float32_matmul_precision("medium")
    job = Job(
        Path(args.folder), hf.load_model(Path(args.folder))[0], args.batch, args.precision or "none",
        torch.device(args.device), Path(args.peer) if args.peer else None, args.compile, args.tuned,
    )  # fmt: skip
    answers, sys.stdout = sys.stdout, sys.stderr  # what the trainers print is no answer
    CONTENDERS[args.contender](job, turns(job.device, answers))


def turns(device: torch.device, answers: TextIO) -> Iterator[list[Tensor]]:
    """One item per update that is asked for: the list that takes its loss. Of a turn the first one is not timed: it finds
    caches cold, and in the first turn nothing compiled."""
    for line in sys.stdin:
        answer: dict[str, Any] = {"memory": None}
        if line.strip() == "profile":
            yield from profiled(device, answer)
        else:
            yield from timed(device, int(line), answer)
        if device.type == "cuda":
            answer["memory"] = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()  # for the others, who take their turns in the same memory
        print(json.dumps(answer), file=answers, flush=True)


def timed(device: torch.device, updates: int, answer: dict[str, Any]) -> Iterator[list[Tensor]]:
    losses: list[Tensor] = []
    ends: list[Any] = []
    start = time.perf_counter()
    for number in range(updates + 1):
        yield losses
        if number == 0:
            _finish(device)
            first = time.perf_counter()
        if device.type == "cuda":  # a program that trains does not wait for each update
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
        else:
            ends.append(time.perf_counter())
    enqueued = time.perf_counter()
    _finish(device)
    pairs = itertools.pairwise(ends)
    answer["seconds"] = [a.elapsed_time(b) / 1e3 if device.type == "cuda" else b - a for a, b in pairs]
    answer["first_seconds"] = first - start
    answer["host_seconds"] = (enqueued - first) / max(updates, 1)
    answer["losses"] = [float(loss) for loss in losses]


def profiled(device: torch.device, answer: dict[str, Any]) -> Iterator[list[Tensor]]:
    """Three updates. Answers the costs of one, largest first: (kernel or, on a CPU, operation, seconds, launches)."""
    yield []
    _finish(device)
    with torch.profiler.profile() as profile:
        for _ in range(3):
            yield []
        _finish(device)
    on_device = device.type == "cuda"
    costs = [
        (event.key, (event.self_device_time_total if on_device else event.self_cpu_time_total) / 3e6, event.count / 3)
        for event in profile.key_averages()
        if not on_device or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    answer["costs"] = sorted(costs, key=lambda cost: -cost[1])[:40]
    answer["seconds"] = sum(seconds for _, seconds, _ in costs)
    answer["launches"] = sum(launches for *_, launches in costs)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ours(job: Job, wanted: Iterator[list[Tensor]]) -> None:
    """The trainer's own step on the torch runtime, with its guard, its clipping and its reading of the loss."""
    from gpt2xla.checkpoint.loading import build_model
    from gpt2xla.runtime.torch.runtime import TorchRuntime
    from gpt2xla.training.train_step import TrainStep

    # On a GPU ours is what a run does unasked.
    options = {
        "train_batch_size": job.batch, "gradient_accum_step": 1, "mixed_precision": job.precision,
        "compile": None if job.device.type == "cuda" else job.compile,
        "betas": BETAS, "weight_decay": DECAY, "max_grad_norm": CLIP, "train_steps": 10_000, **OPTIM,
    }  # fmt: skip
    config = dataclasses.replace(RunConfig.from_flat(options), model=job.model)
    runtime = TorchRuntime(TorchConfig(), config.train)
    model = build_model(job.model, hf.load_model(job.folder)[1], job.folder)
    step = TrainStep(config, runtime, model, None)
    batches = runtime.device_batches(Batch(*job.tokens(number)) for number in range(10_000))
    model.train()
    for number, out in enumerate(wanted):
        loss, grad_norm, _ = step(batches, number, Phase(0, job.batch, 1), job.batch * job.model.seq_length)
        runtime.when_ready(lambda loss, norm: None, torch.stack([loss, grad_norm]))  # read when the trainer reads them
        out.append(loss.detach())


def nanogpt(job: Job, wanted: Iterator[list[Tensor]]) -> None:
    sys.path.insert(0, str(job.peer))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    c = job.model
    model = GPT(
        GPTConfig(
            block_size=c.seq_length, vocab_size=c.vocab_size, n_layer=c.num_layers, n_head=c.num_heads,
            n_embd=c.d_model, dropout=0.0, bias=True,
        )
    )  # fmt: skip
    weights = {f"transformer.{name}": tensor for name, tensor in hf.load_model(job.folder)[1].items()}
    model.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    model.to(job.device)
    optimizer = model.configure_optimizers(DECAY, 6e-4, BETAS, job.device.type)
    if job.tuned:
        optimizer = _adamw(model, fused=True)
    compiled = torch.compile(model, backend="inductor") if job.compile else model
    _loop(job, wanted, model, optimizer, lambda x, y: compiled(x, y)[1])


def reference(job: Job, wanted: Iterator[list[Tensor]]) -> None:
    """minhnguyent546/pre-training-gpt2."""
    sys.path.insert(0, str(job.peer))
    from gpt2.model import GPT, GPTConfig  # type: ignore[import-not-found]
    from gpt2.utils import make_optimizer  # type: ignore[import-not-found]

    c = job.model
    model = GPT(
        GPTConfig(
            vocab_size=c.vocab_size, seq_length=c.seq_length, d_model=c.d_model, num_layers=c.num_layers,
            num_heads=c.num_heads, d_ff=c.d_ff, dropout=0.0, eps=c.layer_norm_eps,
        )
    )  # fmt: skip
    model.tie_weights()
    names = {
        "wte.": "token_embedding.", "wpe.": "positional_embedding.", "h.": "decoder_blocks.", "ln_1.": "layer_norm_1.",
        "ln_2.": "layer_norm_2.", "ln_f.": "layer_norm.", "attn.c_attn.": "causal_self_attention.w_qkv.",
        "attn.c_proj.": "causal_self_attention.rl_projection.", "mlp.c_fc.": "position_wise_ffn.linear.",
        "mlp.c_proj.": "position_wise_ffn.rl_projection.",
    }  # fmt: skip
    weights = {}
    for name, tensor in hf.load_model(job.folder)[1].items():
        for own, theirs in names.items():
            if name.startswith(own) or f".{own}" in name:
                name = name.replace(own, theirs, 1)
        weights[name] = tensor
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert not unknown, unknown
    assert all("mask" in name or name == "lm_head.weight" for name in missing), missing
    model.to(job.device)
    optimizer = make_optimizer(model, job.device, "adamw", lr=6e-4, betas=BETAS, weight_decay=DECAY)
    criterion = torch.nn.CrossEntropyLoss()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        return criterion(logits.view(-1, logits.size(-1)), y.view(-1))

    _loop(job, wanted, model, optimizer, loss)


def transformers_trainer(job: Job, wanted: Iterator[list[Tensor]]) -> None:
    """GPT2LMHeadModel under transformers.Trainer, with the optimizer and schedule of the others."""
    from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    model = GPT2LMHeadModel.from_pretrained(job.folder)
    model.config.use_cache = False
    optimizer = _adamw(model, fused=job.device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step) / 6e-4)
    current: list[list[Tensor]] = []

    class Sequences(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10_000 * job.batch

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            if index % job.batch == 0:
                self.batch = job.tokens(index // job.batch)
            x, y = (part[index % job.batch] for part in self.batch)
            return {"input_ids": x, "labels": torch.cat([x[:1], y[:-1]]), "last": y[-1]}

    class Loss(Trainer):
        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            # transformers shifts labels itself and would not count the last token of a window.
            labels = torch.cat([inputs["labels"][:, 1:], inputs["last"][:, None]], dim=1)
            loss = model(input_ids=inputs["input_ids"], labels=labels, shift_labels=labels).loss
            current[-1].append(loss.detach())
            return loss

    class Turn(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turn = next(wanted, None)
            if turn is None:
                raise SystemExit
            current.append(turn)

    arguments = TrainingArguments(
        output_dir=str(job.folder / "trainer"), per_device_train_batch_size=job.batch, max_steps=10_000, report_to=[],
        bf16=job.precision == "bf16", fp16=job.precision == "fp16", max_grad_norm=CLIP, logging_strategy="no",
        save_strategy="no", torch_compile=job.compile, use_cpu=job.device.type == "cpu", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=job.device.type == "cuda",
    )  # fmt: skip
    trainer = Loss(model, arguments, train_dataset=Sequences(), optimizers=(optimizer, schedule), callbacks=[Turn()])
    trainer.train()


def _adamw(model: torch.nn.Module, *, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model.parameters(), DECAY), 6e-4, BETAS, ADAM_EPS, fused=fused)


def _loop(
    job: Job, wanted: Iterator[list[Tensor]], model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss_of: Update
) -> None:
    """The usual loop, as nanoGPT's train.py has it."""
    pins = job.device.type == "cuda"
    for step, losses in enumerate(wanted):
        x, y = ((t.pin_memory() if pins else t).to(job.device, non_blocking=pins) for t in job.tokens(step))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        with job.autocast():
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())


CONTENDERS = {"ours": ours, "nanoGPT": nanogpt, "reference": reference, "Trainer": transformers_trainer}

if __name__ == "__main__":
    main()
