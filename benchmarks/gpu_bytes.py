#!/usr/bin/env python
"""Where the time of an update goes by arithmetic: bytes and operations of each kernel over the rates of a card.

    python benchmarks/gpu_bytes.py --nanogpt nanoGPT/model.py

It makes some updates with our trainer and with nanoGPT (compiled, as its train.py does it), and counts one of them.
Nothing is timed, so any CUDA device does, and a busy one too. What is counted:

- torch's operations, in eager code and between compiled kernels: every input is read once and every output written once.
  Views are free. Matrix products and attention also count their floating-point operations.
- Inductor's kernels: the bytes that Inductor itself estimates.
- Other Triton kernels: every tensor argument once for loads and once for stores, as their source has them.

A kernel takes as long as its bytes or its operations, whichever takes longer. Caches are not modelled: what one kernel
writes, the next one reads from memory.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import multiprocessing
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from train_contenders import CONTENDERS, SIZES, Job, draw_weights, folder_of_model

# What an H100 SXM reaches, in FLOP/s and bytes/s: large bf16 products; products whose rows do not begin at multiples of 16
# bytes, which its matrix units cannot fetch by themselves; causal attention; passes over memory.
PRODUCTS, UNALIGNED, MEMORY = 700e12, 250e12, 3.0e12
TRITON_PRODUCTS = 550e12  # Triton's own, which are slower than cuBLAS's but may compute more in passing
ATTENTION = {"FlashAttention 2": 250e12, "cuDNN": 390e12}
PARTS = ("products", "attention", "blocks", "loss", "optimizer", "embedding, rest")

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_addmm_activation"}
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_local_scalar_dense",
    "_unsafe_view",
}
_OVERWRITTEN = {"copy_", "fill_", "zero_"}
_LOOKUPS = {
    "embedding",
    "index",
    "index_select",
    "gather",
}  # which read only as much of their first argument as they return
_SCATTERED = {"index_put_", "_index_put_impl_", "index_copy_", "scatter_", "index_add_"}


@dataclass
class Work:
    """What the kernels of one name did in one part of an update."""

    launches: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0  # attention's with FlashAttention 2
    unaligned: float = 0.0  # of `flops`, those of products with rows that are not aligned

    def add(self, other: Work) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Update:
    """One counted update. `work` is by part and kernel."""

    work: dict[tuple[str, str], Work] = field(default_factory=dict)
    reads: int = 0  # values and tensors that went from the device to the host
    peak_bytes: int = 0

    def part(self, name: str) -> Work:
        total = Work()
        for (part, _), work in self.work.items():
            if part == name:
                total.add(work)
        return total


class Counter(TorchDispatchMode):
    """Counts what an update launches on one kind of device."""

    def __init__(self, vocab_size: int, device: str = "cuda") -> None:
        super().__init__()
        self.vocab_size, self.device, self.update, self.phase = vocab_size, device, Update(), "forward"

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is launched inside, also in the backward pass's thread."""
        from torch._inductor.output_code import CompiledFxGraph
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner
        from triton.runtime.jit import JITFunction

        with (
            _replaced(CompiledFxGraph, "__call__", self._graph_call),
            _replaced(CachingAutotuner, "run", self._inductor_run),
            _replaced(JITFunction, "run", self._triton_run),
            _replaced(torch.autograd, "backward", self._backward),
            self,
        ):
            yield

    def _graph_call(self, original: Callable[..., Any], *args: Any) -> Any:
        # The backward pass comes here with the counter on, the forward pass through `_uncounted_compile`.
        with self if _get_current_dispatch_mode() is None else nullcontext():
            return original(*args)

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.phase = "backward"
        result = original(*args, **kwargs)
        self.phase = "optimizer"
        return result

    def _inductor_run(self, original: Callable[..., Any], kernel: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        names = [n for n, kind in kernel.triton_meta["signature"].items() if kind != "constexpr"]
        named, size = dict(zip(names, args, strict=False)), kernel.inductor_meta.get("kernel_num_gb")
        if size is None:  # written by hand, in compiled code
            moved = triton_bytes(kernel.fn, named)
        else:
            # Inductor leaves buffers out that such a kernel has written.
            moved = max(size * 1e9, inductor_bytes(named))
        self._add(kernel.inductor_meta.get("kernel_name", kernel.fn.__name__), tensors, moved, "blocks")
        return original(kernel, *args, **kwargs)

    def _triton_run(self, original: Callable[..., Any], kernel: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        tensors = [arg for arg in named.values() if isinstance(arg, Tensor)]
        moved, flops = triton_bytes(kernel, named), 0.0
        if "tl.dot" in inspect.getsource(kernel.fn):
            flops = 2.0 * named["rows"] * named["COLUMNS"] * named["DEPTH"]
        self._add(kernel.fn.__name__, tensors, moved, "products" if flops else "blocks", flops, rate=TRITON_PRODUCTS)
        return original(kernel, *args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        given = _tensors((args, kwargs))
        is_here = any(t.device.type == self.device for t in given)
        if namespace not in ("aten", "prims") and is_here:
            with self:  # a library's operation is what it launches
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
        if is_here:
            with self:  # as it is where autograd has not taken an operation apart
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        returned = _tensors(result)
        goes_here = any(t.device.type == self.device for t in returned)
        if is_here and (name == "_local_scalar_dense" or (returned and not goes_here)):
            self.update.reads += 1
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if views or name in _FREE or not (is_here or goes_here):
            return result
        moved = eager_bytes(func, name, args, kwargs, returned)
        if name in _PRODUCTS:
            left = given[-2] if "out" not in kwargs else given[-3]
            flops = 2.0 * returned[0].numel() * left.shape[-1]
            odd = any(map(_has_odd_rows, [*given, *returned]))
            self._add(name, given, moved, "products", flops, unaligned=flops if odd else 0.0)
        elif "attention" in name:
            queries, keys = (given[1], given[2]) if "backward" in name else (given[0], given[1])
            flops = 4.0 * queries.numel() * keys.shape[-2] / 2  # the future's half is left out
            self._add(name, given, moved, "attention", flops * (2.5 if "backward" in name else 1.0))
        else:
            self._add(name, [*given, *returned], moved, "embedding, rest")
        return result

    def _add(
        self,
        name: str,
        tensors: list[Tensor],
        moved: float,
        part: str,
        flops: float = 0.0,
        unaligned: float = 0.0,
        rate: float = PRODUCTS,
    ) -> None:
        if part not in ("products", "attention"):
            if self.phase == "optimizer":
                part = "optimizer"
            elif "embedding" not in name and any(self.vocab_size in t.shape for t in tensors):
                part = "loss"
        rate = ATTENTION["FlashAttention 2"] if part == "attention" else UNALIGNED if unaligned else rate
        work = Work(1, moved, flops, max(moved / MEMORY, flops / rate), unaligned)
        self.update.work.setdefault((part, name), Work()).add(work)


@contextmanager
def _replaced(owner: Any, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """Let `by(original, ...)` be called in place of an attribute."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: by(original, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _uncounted_compile(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Return what torch.compile does, but callable while operations are counted: Dynamo takes another program then."""
    compiled = original(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return compiled(*args, **kwargs)

    return call


def eager_bytes(func: Any, name: str, args: Any, kwargs: Any, returned: list[Tensor]) -> float:
    """Return the bytes that one of torch's operations reads and writes."""
    schema, moved, aliased = func._schema, 0.0, False
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    for argument in schema.arguments:
        size = float(sum(map(_bytes, _tensors(given.get(argument.name)))))
        is_first = argument is schema.arguments[0]
        if argument.alias_info is not None and argument.alias_info.is_write:
            aliased = True
            if name in _SCATTERED:
                values = _tensors(given.get("values", given.get("src", given.get("source"))))
                moved += sum(map(_bytes, values))
                continue
            if name.startswith("_fused_adam") and argument.name in ("grads", "state_steps"):
                # torch says that these are changed; gradients are only if a scale is given.
                moved += size * (1 if given.get("grad_scale") is None else 2)
                continue
            reads = not argument.kwarg_only and not (is_first and name in _OVERWRITTEN)
            moved += size * (2 if reads else 1)
        elif name in _LOOKUPS and is_first:
            moved += sum(map(_bytes, returned))
        else:
            moved += size
    return moved if aliased else moved + sum(map(_bytes, returned))


def triton_bytes(kernel: Any, arguments: dict[str, Any]) -> float:
    """Return the bytes that a Triton kernel moves if it loads or stores all of every tensor, each once."""
    loaded, stored = triton_accesses(kernel)
    return float(
        sum(
            _bytes(tensor) * max(1, (name in loaded) + (name in stored))
            for name, tensor in arguments.items()
            if isinstance(tensor, Tensor)
        )
    )


def inductor_bytes(arguments: dict[str, Any]) -> float:
    """Return the bytes that an Inductor kernel moves by its arguments: it reads no more of a tensor than it has elements."""
    elements = math.prod(number for name, number in arguments.items() if name.endswith("numel"))
    return float(
        sum(
            min(_bytes(tensor), elements * tensor.element_size()) * (2 if name.startswith("in_out") else 1)
            for name, tensor in arguments.items()
            if isinstance(tensor, Tensor)
        )
    )


@cache
def triton_accesses(kernel: Any) -> tuple[set[str], set[str]]:
    """Return the names of the parameters through which a Triton kernel's source loads, and through which it stores."""
    function = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body[0]
    assert isinstance(function, ast.FunctionDef)
    origins = {argument.arg: {argument.arg} for argument in function.args.args}

    def behind(node: ast.AST) -> set[str]:
        """Return the parameters that an expression is computed from, but not those that it loads from."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            return set()
        if isinstance(node, ast.Name):
            return origins.get(node.id, set())
        return set().union(*map(behind, ast.iter_child_nodes(node)))

    for _ in range(3):  # a loop may use what is assigned further down
        for node in ast.walk(function):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            value = getattr(node, "value", None)
            for target in targets if value is not None else []:
                for name in ast.walk(target) if target is not None else []:
                    if isinstance(name, ast.Name):
                        origins[name.id] = origins.get(name.id, set()) | behind(value)
    loaded: set[str] = set()
    stored: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if node.func.attr == "load" or node.func.attr.startswith("atomic_"):
                loaded |= behind(node.args[0])
            if node.func.attr == "store" or node.func.attr.startswith("atomic_"):
                stored |= behind(node.args[0])
    return loaded, stored


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _bytes(tensor: Tensor) -> int:
    own = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        own *= size if stride else min(size, 1)  # an expanded dimension is one and the same memory
    return own * tensor.element_size()


def _has_odd_rows(tensor: Tensor) -> bool:
    strides = [s for size, s in zip(tensor.shape[-2:], tensor.stride()[-2:], strict=True) if size > 1 and s > 1]
    return tensor.dim() >= 2 and any(stride * tensor.element_size() % 16 for stride in strides)


def count(kind: str, job: Job, in_products: bool) -> Update:
    """Return what an update of the contender does. It is for a process of its own.

    Whether ours computes the activation `in_products` is what a run finds out by measuring."""
    import gpt2xla.model.fused.block as fused
    import gpt2xla.runtime.torch.runtime as runtime

    runtime.largest_error = lambda *args: 0.0  # results need not be right, on a device that computes nothing
    fused.fastest_tile = lambda *args: fused.TILES[0] if in_products else None
    import torch._inductor.config as inductor

    inductor.benchmark_kernel = True  # with which Inductor notes the bytes of its kernels
    counter = Counter(job.model.vocab_size)

    def wanted() -> Iterator[list[Tensor]]:
        for _ in range(3):  # compiled, and with the optimizer's state
            yield []
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with counter.counting():
            yield []
        torch.cuda.synchronize()
        counter.update.peak_bytes = torch.cuda.max_memory_allocated()

    with _replaced(torch, "compile", _uncounted_compile):
        CONTENDERS[kind](job, wanted())
    return counter.update


def table(updates: dict[str, Update], top: int) -> str:
    names = list(updates)
    lines = [
        "| part | " + " | ".join(f"{name}: TFLOP | GB | ms" for name in names) + " |",
        "|---|" + "---|" * 3 * len(names),
    ]

    def row(label: str, works: list[Work]) -> str:
        cells = (f"{w.flops / 1e12:.1f} | {w.bytes / 1e9:.1f} | {w.seconds * 1e3:.1f}" for w in works)
        return f"| {label} | {' | '.join(cells)} |"

    totals = {name: Work() for name in names}
    for part in PARTS:
        works = [update.part(part) for update in updates.values()]
        lines.append(row(part, works))
        for total, work in zip(totals.values(), works, strict=True):
            total.add(work)
    lines.append(row("sum, FlashAttention 2", list(totals.values())))
    faster = ATTENTION["FlashAttention 2"] / ATTENTION["cuDNN"]
    for name, update in updates.items():
        totals[name].seconds -= update.part("attention").seconds * (1 - faster)
    lines.append(row("sum, cuDNN's attention", list(totals.values())))
    notes = []
    for name, update in updates.items():
        own = (
            f"{sum(w.launches for w in update.work.values())} kernels and operations, {update.reads} reads by the host"
        )
        odd = update.part("products").unaligned / 1e12
        ragged = f", {odd:.1f} TFLOP in products with rows that are not aligned to 16 bytes" if odd else ""
        notes.append(f"- {name}: {own}, at most {update.peak_bytes / 1e9:.1f} GB{ragged}.")
    if len(names) == 2:
        ours, theirs = (totals[name].seconds for name in names)
        notes.append(f"- By this estimate {names[0]} takes {ours / theirs:.3f} of the time of {names[1]}.")
    for name, update in updates.items() if top else ():
        notes += [
            "",
            f"{name}: the {top} kernels that take longest",
            "",
            "| part | kernel | launches | GB | ms |",
            "|---|---|---|---|---|",
        ]
        for (part, kernel), w in sorted(update.work.items(), key=lambda item: -item[1].seconds)[:top]:
            notes.append(f"| {part} | `{kernel[:70]}` | {w.launches} | {w.bytes / 1e9:.2f} | {w.seconds * 1e3:.2f} |")
    return "\n".join([*lines, "", *notes]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--nanogpt", type=Path, metavar="PATH", help="karpathy/nanoGPT's model.py, or the folder it is in"
    )
    parser.add_argument("--only", choices=("ours", "nanoGPT"), help="count only this one")
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--batch", type=int, help="sequences per update (default: by size)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--activation-in-products", action="store_true", help="count ours as where that is faster")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="also list the N kernels that take longest")
    args = parser.parse_args()
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch {args.batch}: choose a number of at least 1")
    if args.activation_in_products and args.precision == "fp32":
        parser.error("--activation-in-products needs --precision bf16 or fp16")
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    chosen = {"ours": None} if args.only != "nanoGPT" else {}
    if args.nanogpt and args.only != "ours":
        try:
            chosen["nanoGPT"] = folder_of_model(args.nanogpt)
        except ValueError as error:
            parser.error(f"--nanogpt {error}")
    if not chosen:
        parser.error("--only nanoGPT needs --nanogpt")
    options, _, batch = SIZES[args.size]
    updates = {}
    with tempfile.TemporaryDirectory() as name:
        config = draw_weights(Path(name), options)
        for kind, peer in chosen.items():
            job = Job(
                Path(name), config, args.batch or batch, "none" if args.precision == "fp32" else args.precision,
                torch.device("cuda"), peer, compile=True, tuned=False,
            )  # fmt: skip
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                updates[kind] = process.submit(count, kind, job, args.activation_in_products).result()
    print(f"{args.size}, {args.batch or batch} x {config.seq_length}, {args.precision}, torch {torch.__version__}\n")
    print(table(updates, args.top))


if __name__ == "__main__":
    main()
