"""The kinds of devices that torch drives, one class each: every question of the kind of a device is answered here.

Another kind is one more class, and one more line in `pick_accelerator`."""

from __future__ import annotations

import bisect
import functools
import math
import os
import traceback
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpt2xla.config import ModelConfig
from gpt2xla.errors import InputError, in_one_line
from gpt2xla.logs.peak_flops import measured_cpu_flops, named_peak_flops
from gpt2xla.model.attention import chunked_attention, kept_attention
from gpt2xla.model.kernels import Attention, Fused, LogSums
from gpt2xla.model.loss import LOGITS_AT_ONCE, in_place_cross_entropy
from gpt2xla.runtime.base import GIB, Memory, Shortage
from gpt2xla.runtime.memory import STATE_BYTES, host_step_bytes
from gpt2xla.runtime.one_device import set_matmul_precision
from gpt2xla.runtime.precision import DevicePrecision, of_cuda
from gpt2xla.runtime.torch.compile import uncompiled
from gpt2xla.runtime.torch.cpu import choose_products, share_cores
from gpt2xla.runtime.torch.host_memory import free_host_memory, keep_freed_memory
from gpt2xla.runtime.torch.process_group import Place
from gpt2xla.runtime.trial import Trial

_FILLED = 0.9  # of free memory, the share that --train-batch-size auto may fill
_TOKENS_TO_MEASURE, _TIMES_TO_MEASURE = 16_384, 5

# Messages for memory that was not requested through torch's own allocator, and those of MPS's allocator.
_DEVICE_IS_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory")


class Accelerator(Memory):
    """One device of a kind, its memory, and how that kind differs from others. This class holds what most kinds have."""

    kind: str  # torch's name of the kind
    name: str  # the device's own name
    backend = "gloo"  # what torch.distributed reduces with
    fused = False  # whether torch has a fused Adam for it
    has_fused = False  # whether the kernels of model/fused/ run here
    why_not_fused: str | None = None  # what a device lacks that should run them
    pins = False  # whether batches are copied from pinned memory, while the device works
    reads_behind = 0  # how many steps late the host reads a step's values, so that the device never waits for work
    reads_wait = True  # whether reading a value makes the host wait for the device
    attention: dict[str, Attention] = {"chunked": chunked_attention}  # noqa: RUF012  by --attention, besides sdpa
    kept_bytes = 0  # up to which attention keeps what its backward pass needs, unasked
    logits_at_once: int | None = None  # bytes of logits that are made at a time; None makes all of them
    ddp_ids: list[torch.device] | None = None  # for DistributedDataParallel
    averages = True  # whether FSDP's reduction gives the mean of gradients
    compile_pays_from = float("inf")  # FLOPs of a run that make up for the compile, unasked
    stack_bytes = 0  # of matrices that Muon updates together
    can_try = True  # whether `has_room_for` can do work on this process alone

    def __init__(self, index: int | None = None) -> None:
        self.device = torch.device(self.kind if index is None else f"{self.kind}:{index}")
        self.name = self.kind.upper()

    def prepare(self, matmul_precision: str) -> None:
        """Set torch up for this kind of device, once per process."""
        set_matmul_precision(matmul_precision)

    def precision(self) -> DevicePrecision:
        """Return which compute types the device likes."""
        return DevicePrecision(self.name, "none", "is trained in fp32", "none")

    def describe(self, processes: int) -> str:
        """Return the devices of all `processes` in words."""
        return f"{processes} x {self.name}"

    def chunked_loss(self, dtype: torch.dtype) -> tuple[Callable[..., Tensor], int | None]:
        """Return the loss in pieces for products in `dtype`, as in `loss.py`, and how many bytes of logits make a piece,
        unasked; None makes all of them at once."""
        # Unscaled gradients are not in fp16's range.
        at_once = None if dtype == torch.float16 else self.logits_at_once
        return partial(in_place_cross_entropy, reads_wait=self.reads_wait), at_once

    def log_sums(self) -> LogSums | None:
        """Return the device's own form of `Kernels.log_sums`, if it has one."""
        return None

    def read_later(self, values: Tensor) -> Callable[[], list[float]]:
        """Return what reads the 1-d tensor's values, once the device has them."""
        return values.tolist

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a copy of the tensor on the host."""
        return tensor.to("cpu", copy=True)

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Return the peak floating-point operations per second; None if unknown."""
        return named_peak_flops(self.name)

    def shortage(self, error: Exception) -> Shortage | None:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _DEVICE_IS_FULL):
            return self.when_full()
        return super().shortage(error)

    def when_full(self) -> Shortage:
        """Return what is known when the device's own memory has run out."""
        return Shortage(self.name)

    def has_room_for(self, work: Callable[[], None]) -> bool | None:
        if not self.can_try:
            return None
        try:
            with uncompiled():
                work()
        except Exception as error:
            if self.shortage(error) is None:
                raise
            traceback.clear_frames(error.__traceback__)
            return False
        return True

    def fused_blocks(self, model: ModelConfig, tokens: int, dtype: torch.dtype, *, measures: bool) -> Fused | None:
        """Return kernels for whole blocks of the model, if the device has them.

        Args:
            tokens: how many a micro-step has.
            dtype: of the products.
            measures: whether it pays to find out which kernels are faster here."""
        return None

    def why_not_compiled(self) -> str | None:
        """Return what torch.compile lacks on this machine, or None if it has all."""
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError):
            return "it needs a C++ compiler, such as g++"
        return None


class Cpu(Accelerator):
    """The host's processor."""

    kind = "cpu"
    fused = True
    attention = {"chunked": chunked_attention, "kept": kept_attention}  # noqa: RUF012
    kept_bytes = 2**31
    logits_at_once = LOGITS_AT_ONCE["cpu"]
    reads_wait = False
    averages = False  # gloo in torch 2.8 gives the sum where it is asked for the mean
    compile_pays_from = 2e14  # a quarter of an hour of two cores, where a compile saves a twentieth of the time

    def prepare(self, matmul_precision: str) -> None:
        share_cores()
        keep_freed_memory()
        choose_products(matmul_precision)

    def precision(self) -> DevicePrecision:
        # torch computes with these through oneDNN; other CPUs widen bf16 to fp32 first.
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return DevicePrecision("a CPU", "none", "is trained in fp32", "bf16" if has_bf16 else "none")

    def describe(self, processes: int) -> str:
        count = torch.get_num_threads()
        threads = f"{count} thread{'s' if count > 1 else ''}{' each' if processes > 1 else ''}"
        return f"{super().describe(processes)}, {threads}"

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        return measured_cpu_flops(dtype)

    def free(self) -> int | None:
        free = free_host_memory()
        return None if free is None else free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def most_that_fit(self, trial: Trial) -> int:
        # No more than 32: larger micro-batches are not known to be faster here, and take memory.
        most, free = super().most_that_fit(trial), self.free()
        if free is None:
            return most

        def fits(share: int) -> bool:
            config, state = trial.config_of(share), (STATE_BYTES - 4) * trial.parameters
            return state + host_step_bytes(config.model, config.train, trial.parameters, share) <= _FILLED * free

        return next((share for share in trial.shares if share <= most and fits(share)), trial.shares[-1])


class Cuda(Accelerator):
    """An NVIDIA GPU, or one of AMD's, which torch calls by the same name."""

    kind = "cuda"
    backend = "nccl"
    fused = True
    pins = True
    reads_behind = 1
    logits_at_once = LOGITS_AT_ONCE["cuda"]
    stack_bytes = 2**27  # twelve of the 124M model's largest matrices; those of larger models fill a GPU sooner
    compile_pays_from = 1e15  # a few minutes of a slow GPU, where a compile saves a third of the time

    def __init__(self, index: int | None = 0) -> None:
        super().__init__(index)
        self.name = torch.cuda.get_device_name(self.device)
        self.ddp_ids = [self.device]

    def prepare(self, matmul_precision: str) -> None:
        super().prepare(matmul_precision)
        # AMD's products of 16-bit numbers are not summed in fp32. Older GPUs have no Triton.
        if not torch.version.hip and torch.cuda.get_device_capability(self.device) >= (7, 0):
            self.why_not_fused = self.why_not_compiled()
            self.has_fused = self.why_not_fused is None

    def precision(self) -> DevicePrecision:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # also on all of AMD's
        return of_cuda(self.name, has_bf16, torch.cuda.get_device_capability(self.device))

    def read_later(self, values: Tensor) -> Callable[[], list[float]]:
        on_host = values.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def read() -> list[float]:
            event.synchronize()
            return on_host.tolist()

        return read

    def to_host(self, tensor: Tensor) -> Tensor:
        # The driver would copy to ordinary memory by one thread, which is slow where that memory is new. Here the device
        # fills one half of a pinned buffer while all threads empty the other. Pinning the whole copy, which would be
        # faster, could take most of the host's memory from other programs.
        on_host, halves = torch.empty(tensor.shape, dtype=tensor.dtype), self._staging.view(tensor.dtype)
        filled: list[tuple[torch.cuda.Event, Tensor, Tensor]] = []

        def empty(event: torch.cuda.Event, half: Tensor, target: Tensor) -> None:
            event.synchronize()
            target.copy_(half)

        pieces, targets = (t.reshape(-1).split(halves.shape[1]) for t in (tensor, on_host))
        for number, (piece, target) in enumerate(zip(pieces, targets, strict=True)):
            half = halves[number % 2, : len(piece)].copy_(piece, non_blocking=True)
            filled.append((torch.cuda.current_stream().record_event(), half, target))
            if number:
                empty(*filled[-2])
        empty(*filled[-1])
        return on_host

    @functools.cached_property
    def _staging(self) -> Tensor:
        return torch.empty(2, 2**24, dtype=torch.uint8, pin_memory=True)

    def chunked_loss(self, dtype: torch.dtype) -> tuple[Callable[..., Tensor], int | None]:
        if not self.has_fused:
            return super().chunked_loss(dtype)
        from gpt2xla.model.fused.cross_entropy import fused_cross_entropy

        return fused_cross_entropy, self.logits_at_once

    def log_sums(self) -> LogSums | None:
        if not self.has_fused:
            return None
        from gpt2xla.model.fused.cross_entropy import fused_log_sums

        return fused_log_sums

    def when_full(self) -> Shortage:
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return Shortage(f"{self.device} ({self.name}, {memory / GIB:.0f} GiB)", memory)

    def has_room_for(self, work: Callable[[], None]) -> bool | None:
        torch.cuda.empty_cache()
        return super().has_room_for(work)

    def most_that_fit(self, trial: Trial) -> int:
        if not self.can_try:
            return super().most_that_fit(trial)
        # What the run will need besides: evaluations, and the gaps that allocations of many sizes leave.
        memory = torch.cuda.get_device_properties(self.device).total_memory
        spared = torch.empty(int((1 - _FILLED) * memory), dtype=torch.uint8, device=self.device)
        first = bisect.bisect_left(trial.shares, True, key=lambda share: bool(trial.rehearse(share)))
        del spared
        return trial.shares[min(first, len(trial.shares) - 1)]

    def why_not_compiled(self) -> str | None:
        from torch.utils._triton import has_triton

        if not has_triton():
            return "it needs Triton, and a GPU of compute capability 7.0 or more"
        from triton.runtime import driver

        try:
            driver.active.get_current_target()  # compiles the program that starts kernels, unless a run before did
        except Exception as error:
            return (
                "Triton needs a C compiler, such as gcc, Python's header files (python3-dev) and a TRITON_CACHE_DIR that it "
                f"can write to ({in_one_line(error)})"
            )
        return None

    def fused_blocks(self, model: ModelConfig, tokens: int, dtype: torch.dtype, *, measures: bool) -> Fused | None:
        if not self.has_fused:
            return None
        from gpt2xla.model.fused.block import fastest_tile, fused_block, fused_layer_norm

        tile = None
        if measures and dtype != torch.float32:
            x_ND = torch.randn(min(tokens, _TOKENS_TO_MEASURE), model.d_model, dtype=dtype, device=self.device)
            tile = fastest_tile(model, x_ND, self._seconds)
        products = ", activation in products" if tile else ""
        return Fused(partial(fused_block, tile=tile), fused_layer_norm, f"fused blocks{products}")

    def _seconds(self, work: Callable[..., object], *args: object) -> float:
        """Return how long `work(*args)` takes on the device, at best."""
        work(*args)
        best = math.inf
        for _ in range(_TIMES_TO_MEASURE):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work(*args)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        return best


class Mps(Accelerator):
    """Apple's GPU. No backend of torch.distributed reduces over it, so it works in single processes only."""

    kind = "mps"


def pick_accelerator(place: Place | None, asked: str = "auto") -> Accelerator:
    """Return this process's device: a CUDA GPU if torch sees one, else, without torchrun, MPS if there is one, else the CPU.

    `asked` may name one of these: cuda, mps or cpu. Raises InputError if torch finds none of that kind, if there are fewer
    GPUs than processes, or if it is unknown which one is this process's."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and not place}
    if not there.get(asked, True):
        raise InputError(f"--device {asked}: torch finds none here; use --device auto")
    if asked == "cpu":
        return Cpu()
    if asked == "mps" or not there["cuda"]:
        return Mps() if there["mps"] else Cpu()
    processes, devices = place.local_world_size if place else 1, torch.cuda.device_count()
    if processes > devices:
        raise InputError(f"--nproc_per_node {processes}: there are only {devices} GPUs here; start that many processes")
    if place and place.world_size > 1 and place.local_rank is None and devices > 1:
        raise InputError("LOCAL_RANK is not set, which names this process's GPU; start the processes with torchrun")
    index = place.local_rank or 0 if place else 0
    torch.cuda.set_device(index)
    return Cuda(index)


def choose_backend(asked: str | None, accelerator: Accelerator) -> str:
    """Return the backend of torch.distributed. Raises InputError for one that the device does not have."""
    if asked == "nccl" != accelerator.backend:
        raise InputError("--ddp-backend nccl needs CUDA devices, and there are none here; use gloo")
    return asked or accelerator.backend
