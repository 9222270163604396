"""Decoding as CUDA graphs do it, on the CPU: a stand-in for the graph repeats the same operations on the same memory, and
knows nothing of the Python code between them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2xla.config import ModelConfig
from gpt2xla.generation.cuda_graphs import CudaDevice
from gpt2xla.generation.decoding import READING_OF_A_TOKEN, generate
from gpt2xla.generation.sampling import GREEDY, SamplingConfig
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kv_cache import KVCache
from gpt2xla.runtime.base import Device
from gpt2xla.runtime.one_device import OneDevice
from gpt2xla.runtime.precision import ChosenPrecision

CONFIG = ModelConfig(vocab_size=61, seq_length=40, d_model=32, num_layers=2, num_heads=4)
PROMPTS = [[3, 1, 4], [7], list(range(30)), [5] * 50]
DRAWN = SamplingConfig(temperature=0.9, top_k=30)


class Graph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph."""

    made: list[Graph] = []  # noqa: RUF012
    most = 100  # how many can be made

    def capture_begin(self, pool: str, capture_error_mode: str) -> None:
        assert (pool, capture_error_mode) == ("the pool", "thread_local")
        if len(Graph.made) == self.most:
            raise RuntimeError("no more graphs\non this GPU")
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.replays = 0
        self.__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, result in self.calls:
            for old, new in zip(tensors(result), tensors(function(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def tensors(result: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else result


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(CudaDevice, "slots_at_once", 16)


@pytest.fixture(scope="module")
def model() -> GPT2:
    torch.manual_seed(3)
    model = GPT2(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def recording(precision: str = "none", told: list[str] | None = None) -> CudaDevice:
    plain = OneDevice(torch.device("cpu"), ChosenPrecision(precision))
    return CudaDevice(plain, [READING_OF_A_TOKEN], [].append if told is None else told.append)


def texts(model: GPT2, device: Device, prompts: list[list[int]] = PROMPTS, sampling: SamplingConfig = DRAWN) -> list:
    return list(generate(model, prompts, 70, sampling, seeds=range(len(prompts)), device=device))


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_replayed_texts_are_those_of_plain_decoding(model: GPT2, sampling: SamplingConfig) -> None:
    """They outgrow the context, together and alone, in calls with other numbers of rows, on one device."""
    device, plain = recording(), OneDevice(torch.device("cpu"))
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[1:3]):
        assert texts(model, device, prompts, sampling) == texts(model, plain, prompts, sampling)
    assert sum(graph.replays for graph in Graph.made) > 150


def test_each_number_of_slots_is_recorded_once(model: GPT2) -> None:
    """From 3 tokens to 40, then from 20 to 40 again: 16, 32 and 40 slots. All reading of one token is replayed, except the
    first of each number; prompts never are."""
    list(generate(model, [[3, 1, 4]], 59, GREEDY, device=recording()))
    assert [graph.replays for graph in Graph.made] == [16 - 3 - 1, 16 - 1 + (32 - 20), 8 - 1 + 8]


def test_weights_that_have_changed_count(model: GPT2) -> None:
    """As they do between two samples of a training run, which are drawn on one device."""
    device, plain = recording(), OneDevice(torch.device("cpu"))
    before = texts(model, device)
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight.mul_(-1)
    after = texts(model, device)
    assert after == texts(model, plain) != before


def test_two_models_take_turns_on_one_device(model: GPT2) -> None:
    torch.manual_seed(4)
    device, models = recording(), (model, GPT2(CONFIG))
    turns = [generate(model, [[3, 1, 4]], 30, device=device) for model in models]
    together = list(zip(*turns, strict=True))
    alone = [generate(model, [[3, 1, 4]], 30) for model in models]
    assert together == list(zip(*alone, strict=True))


def test_inside_autocast_weights_are_not_cast_for_each_token(model: GPT2) -> None:
    def casts() -> int:
        weights = {id(parameter) for parameter in model.parameters()}
        return sum(id(args[0]) in weights for g in Graph.made for f, args, *_ in g.calls if "_to_copy" in str(f))

    device, plain = recording("bf16"), OneDevice(torch.device("cpu"), ChosenPrecision("bf16"))
    with device.autocast():
        inside = texts(model, device)
    assert casts() == 0
    assert inside == texts(model, plain) == texts(model, device)
    assert casts() > 0


@pytest.mark.parametrize("most", [0, 1])
def test_where_recording_fails_steps_are_run_as_they_are(
    model: GPT2, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(Graph, "most", most)
    told: list[str] = []
    device, plain = recording(told=told), OneDevice(torch.device("cpu"))
    for _ in range(2):
        assert texts(model, device) == texts(model, plain)
    assert told == ["note: generating without CUDA graphs, which is slower: no more graphs"]
    assert len(Graph.made) == most


def test_without_recordings_a_rounded_number_of_slots_gives_the_same_texts(model: GPT2) -> None:
    """As for a model whose weights are split over processes."""
    device = CudaDevice(OneDevice(torch.device("cpu")), [], print)
    assert texts(model, device) == texts(model, OneDevice(torch.device("cpu")))
    assert not Graph.made


def test_no_cache_outlives_its_texts(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training run would miss its memory. The recording that is kept holds no tensor on a GPU, unlike its stand-in."""
    caches: list[weakref.ref[KVCache]] = []
    made = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *args: caches.append(weakref.ref(self)) or made(self, *args))
    device = recording()
    texts(model, device)
    for graph in Graph.made:
        graph.calls.clear()
    assert [cache() for cache in caches] == [None]
