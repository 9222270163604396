"""The steps of gpu.py that measure: training beside other trainers, generation, saving, single kernels."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_step import Job, check, report, run
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_contenders import SIZES
from train_turns import Contender, Turns, losses_apart, measure

from gpt2xla.config import PRESETS, ModelConfig, RunConfig, TorchConfig
from gpt2xla.data.batch_plan import Phase
from gpt2xla.data.windows import Batch
from gpt2xla.generation.decoding import generate
from gpt2xla.generation.devices import move
from gpt2xla.generation.sampling import GREEDY
from gpt2xla.model.gpt2 import GPT2, MLP
from gpt2xla.runtime.torch.runtime import TorchRuntime
from gpt2xla.training.train_step import TrainStep

OURS = Contender("ours", "ours", compile=True, is_compared=True)
SAME_LOSS = 1e-3  # how far losses of 50 updates in bf16 may be from nanoGPT's


def _nanogpt(job: Job) -> list[Contender]:
    return [Contender("nanoGPT, compiled", "nanoGPT", job.nanogpt, True, is_compared=True)] if job.nanogpt else []


def _measure(chosen: list[Contender], size: str, turns: Turns, batch: int | None = None) -> dict[str, Any]:
    return measure(chosen, size, "bf16", "cuda", turns, batch, after_round=lambda run: report("rates", run=run))


def rates_124m(job: Job) -> None:
    chosen = [OURS, *_nanogpt(job)]
    result = _measure(chosen, "124M", Turns(rounds=5, updates=15, curve=50, profiled=frozenset(c.name for c in chosen)))
    for name, apart in losses_apart(result).items():
        check(apart <= SAME_LOSS, f"losses of 50 updates within {apart:.1e} of {name} ({SAME_LOSS:.0e} allowed)")


def rates_trainer(job: Job) -> None:
    if missing := [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]:
        report("note", text=f"Trainer is left out: {' and '.join(missing)} is not installed")
        return
    trainer = Contender("Trainer, compiled", "Trainer", compile=True, may_shrink=True)
    _measure([OURS, trainer], "124M", Turns(rounds=3, updates=10, curve=1, profiled=frozenset({trainer.name})))


def rates_batch_8(job: Job) -> None:
    _measure([OURS, *_nanogpt(job)], "124M", Turns(4, 30, 1), batch=8)


def rates_355m(job: Job) -> None:
    _measure([OURS, *_nanogpt(job)], "355M", Turns(3, 8, 1))


def rates_774m(job: Job) -> None:
    _largest("774M")


def rates_1_5b(job: Job) -> None:
    _largest("1.5B")


def _largest(size: str) -> None:
    """Ours, with about as many sequences as fit without checkpointing, by what a sequence of 124M takes."""
    options = SIZES[size][0]
    with torch.device("meta"):
        parameters = GPT2(ModelConfig(**options)).num_parameters()
    a_sequence = 0.35e9 * options["num_layers"] * options["d_model"] / (12 * 768)
    free = torch.cuda.get_device_properties(0).total_memory - 16 * parameters - 4e9
    batch = 1
    while 2 * batch * a_sequence < free:
        batch *= 2
    ours = Contender("ours", "ours", compile=True, may_shrink=True)
    _measure([ours], size, Turns(rounds=3, updates=5, curve=1), batch)


def generation(job: Job) -> None:
    """New tokens per second after a prompt of 20 tokens, greedy, in bf16; the reading of the prompt counts."""
    new, prompt = 200, torch.randint(0, 50257, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    config = ModelConfig(**PRESETS["gpt2"])
    model = GPT2(config)
    model.init_weights(torch.Generator().manual_seed(0))
    device = move(model, "cuda", "bf16")

    def ours(batch: int) -> int:
        return sum(len(step) for step in generate(model, [prompt] * batch, new, GREEDY, device=device))

    programs: dict[str, Callable[[int], int]] = {"ours": ours}
    if importlib.util.find_spec("transformers"):
        from transformers import GPT2Config, GPT2LMHeadModel

        theirs = GPT2LMHeadModel(GPT2Config()).to(device="cuda", dtype=torch.bfloat16).eval()
        theirs.generation_config.eos_token_id = None  # never end early

        def transformers(batch: int, **options: Any) -> int:
            ids = torch.tensor([prompt] * batch, device="cuda")
            mask = torch.ones_like(ids)
            text = theirs.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0, **options
            )
            return text.numel() - ids.numel()

        programs["transformers"] = transformers
        programs["transformers, static cache"] = partial(transformers, cache_implementation="static")
    else:
        report("note", text="transformers is not installed: generation is not compared with it")
    for name, program in programs.items():  # the last one compiles for long, and may not end
        for batch in (1, 8):
            seconds, rates = [], []
            for _ in range(5):
                torch.cuda.synchronize()
                start = time.perf_counter()
                tokens = program(batch)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
                rates.append(tokens / seconds[-1])
            report("generation", program=name, batch=batch, tokens_per_second=rates[2:], first_seconds=seconds[0])


def save(job: Job) -> None:
    """How long a checkpoint of 124M stops training: the copy of weights and optimizer to host memory."""
    config = ModelConfig(**{**PRESETS["gpt2"], "vocab_size": 50304})
    options = {"train_batch_size": 2, "gradient_accum_step": 1, "mixed_precision": "bf16", "compile": False}
    whole = RunConfig.from_flat(options)
    runtime = TorchRuntime(TorchConfig(), whole.train)
    step = TrainStep(whole, runtime, GPT2(config), None)
    batches = runtime.device_batches(
        Batch(*(torch.zeros(2, 1024, dtype=torch.int64) for _ in range(2))) for _ in range(3)
    )
    step(batches, 0, Phase(0, 2, 1), 2 * 1024)
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        runtime.snapshot(step.model, step.optimizer, job.work)
        seconds.append(time.perf_counter() - start)
    held = 12 * step.model.num_parameters()
    report("save", seconds=seconds, bytes=held)


def _milliseconds(program: Callable[[], Any], times: int = 10) -> float:
    for _ in range(3):
        program()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        program()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def _show(name: str, program: Callable[[], Any], flops: float = 0.0, moved: float = 0.0) -> None:
    try:
        ms = _milliseconds(program)
    except Exception as error:  # a backend that this card or build lacks
        report("kernel", name=name, error=str(error).splitlines()[0][:100] if str(error) else repr(error)[:100])
        return
    report("kernel", name=name, ms=ms, tflops=flops / ms / 1e9, terabytes_per_second=moved / ms / 1e9)


def single_kernels(job: Job) -> None:
    """What the largest parts of an update reach on this card: products, passes over logits, attention."""
    _show_plain()
    for tokens in (9472, 9363):
        _show_head(tokens)
    for name, outputs, inputs in (("c_attn", 2304, 768), ("attn.c_proj", 768, 768), ("mlp.c_proj", 768, 3072)):
        _show_linear(name, outputs, inputs)
    _show_attention()
    _show_fused()


def _make(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, **options)


def _show_plain() -> None:
    source, target, square = _make(2**29), _make(2**29), _make(8192, 8192)
    _show("copy of 1 GiB", lambda: target.copy_(source), moved=4.0 * source.numel())
    _show("product 8192 x 8192 x 8192", lambda: square @ square, 2.0 * 8192**3)


def _show_head(tokens: int) -> None:
    head, logits, x = _make(50304, 768), _make(tokens, 50304), _make(tokens, 768)
    dx, flops, size = torch.empty_like(x), 2.0 * head.numel() * tokens, 2.0 * logits.numel()
    _show(f"head, {tokens} tokens: logits", lambda: torch.mm(x, head.t(), out=logits), flops)
    _show(f"head, {tokens} tokens: dx", lambda: torch.mm(logits, head, out=dx), flops)
    _show(f"head, {tokens} tokens: dx in rows of {tokens}", lambda: head.t() @ logits.t(), flops)
    _show(f"head, {tokens} tokens: dW", lambda: logits.t() @ x, flops)
    _show(f"logits of {tokens} tokens: maximum of each row", lambda: logits.amax(-1), moved=size)
    _show(f"logits of {tokens} tokens: softmax", lambda: torch.softmax(logits, -1, out=logits), moved=2 * size)


def _show_linear(name: str, outputs: int, inputs: int) -> None:
    tokens = 65536
    x, weight, bias, grad = _make(tokens, inputs), _make(outputs, inputs), _make(outputs), _make(tokens, outputs)
    flops = 2.0 * tokens * outputs * inputs
    _show(f"{name}: forward, with bias", lambda: F.linear(x, weight, bias), flops)
    _show(f"{name}: dx", lambda: grad @ weight, flops)
    _show(f"{name}: dW", lambda: grad.t() @ x, flops)


def _show_attention() -> None:
    B, H, T, K = 64, 12, 1024, 64
    qkv, grad = _make(B, T, 3 * H * K, requires_grad=True), _make(B, H, T, K)
    flops = 4.0 * B * H * T * T * K / 2

    def attention(backend: SDPBackend, backward: bool) -> None:
        q, k, v = (t.unflatten(-1, (H, K)).transpose(1, 2) for t in qkv.chunk(3, -1))
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if backward:
            torch.autograd.grad(y, qkv, grad)

    for name, backend in (
        ("FlashAttention 2", SDPBackend.FLASH_ATTENTION),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):
        _show(f"attention, {name}: forward", partial(attention, backend, False), flops)
        _show(f"attention, {name}: forward and backward", partial(attention, backend, True), 3.5 * flops)


def _show_fused() -> None:
    """Show our own kernels, which should move their bytes as fast as a copy does, and both kinds of feed-forward layers."""
    from gpt2xla.model.fused.activation import activated
    from gpt2xla.model.fused.add_norm import add_norm
    from gpt2xla.model.fused.block import feed_forward_layers
    from gpt2xla.model.fused.cross_entropy import by_rows
    from gpt2xla.model.fused.feed_forward import TILES

    N, D = 65536, 768
    x, y, h = _make(N, D).float().requires_grad_(), _make(N, D, requires_grad=True), _make(N, 4 * D, requires_grad=True)
    vector, wide = _make(D).float().requires_grad_(), _make(4 * D).float().requires_grad_()

    def twice(function: Callable[[], Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Any:
        results = function()
        return torch.autograd.grad(results, inputs, results, allow_unused=True)

    norm = partial(add_norm, x, y, vector, vector, vector, 1e-5)
    _show("residual sum and layer norm: forward", norm, moved=12.0 * N * D)
    _show("residual sum and layer norm: forward and backward", partial(twice, norm, x, y, vector), moved=28.0 * N * D)
    gelu = partial(activated, h, wide, "gelu-tanh")
    _show("bias and GELU: forward", gelu, moved=16.0 * N * D)
    _show("bias and GELU: forward and backward", partial(twice, gelu, h, wide), moved=40.0 * N * D)
    logits, labels, losses = (
        _make(9472, 50304),
        torch.zeros(9472, dtype=torch.int64, device="cuda"),
        _make(9472).float(),
    )
    row = partial(by_rows, logits, losses, 0, labels)
    _show("loss of rows and its gradient, 9472 tokens", row, moved=4.0 * logits.numel())
    mlp = MLP(ModelConfig()).cuda()
    for tile in (None, *TILES):
        name = f"activation in products of {tile.rows} x {tile.columns}" if tile else "activation by itself"
        layers = partial(feed_forward_layers, mlp, y, tile)
        _show(f"feed-forward layers, {name}: forward", layers, 16.0 * N * D * D)
        work = partial(twice, layers, y, *mlp.parameters())
        _show(f"feed-forward layers, {name}: forward and backward", work, 48.0 * N * D * D)


if __name__ == "__main__":
    run(
        {
            "rates-124M": rates_124m,
            "rates-trainer": rates_trainer,
            "rates-batch-8": rates_batch_8,
            "rates-355M": rates_355m,
            "rates-774M": rates_774m,
            "rates-1.5B": rates_1_5b,
            "generation": generation,
            "save": save,
            "single-kernels": single_kernels,
        }
    )
