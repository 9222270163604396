"""Files of torch.save, and bare pickles: as models and as training states."""

from __future__ import annotations

import pickle
import shutil
import subprocess
from collections.abc import Callable

import pytest
import torch

from faults.hostile.conftest import Call, Refused
from faults.hostile.scene import FORMATS, WAYS, Scene, sign

SMALL = {"vocab_size": 257, "seq_length": 8, "d_model": 8, "num_layers": 1, "num_heads": 1, "bias": False}
# Places for an evil object in a model file.
PLACES: dict[str, tuple[str, str, Callable[[object], object]]] = {
    **{f"{format}, {way}": (format, way, lambda evil: evil) for format in FORMATS for way in WAYS},
    "in the model": ("zip", "system", lambda evil: {"model": evil, "config": {}}),
    "in the config": ("zip", "system", lambda evil: {"model": {}, "config": evil}),
    "in nanoGPT's arguments": ("legacy", "exec", lambda evil: {"model": {}, "model_args": {"n_layer": evil}}),
}
VALUES: dict[str, object] = {
    "a list": [1, 2],
    "a tensor": torch.zeros(3),
    "model of numbers": {"model": {1: 2}, "config": SMALL},
    "sparse weights": {"model": {"wte.weight": torch.zeros(257, 8).to_sparse()}, "config": SMALL},
    "weights without numbers": {"model": {"wte.weight": torch.zeros(257, 8, device="meta")}, "config": SMALL},
    "sizes that are tensors": {"model": {}, "config": SMALL | {"d_model": torch.zeros(2)}},
    "huge sizes": {"model": {}, "config": SMALL | {"num_layers": 10**9}},
    "width beyond int64": {"model": {}, "config": SMALL | {"d_model": 10**30}},
    "negative padding": {"model": {}, "config": SMALL | {"vocab_padding": -(10**6)}},
}
BROKEN = {
    "empty": b"",
    "stack underflow": b"\x80\x02.",
    "unknown memo": b"\x80\x02h\xff.",
    "a zip without pickles": b"PK\x05\x06" + bytes(18),
    "marks without end": b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
    "text": b"not a checkpoint",
}


@pytest.mark.parametrize("place", PLACES)
def test_an_evil_model(place: str, scene: Scene, refused: Refused) -> None:
    format, way, layout = PLACES[place]
    FORMATS[format](layout(scene.evil(way)), scene.folder / "ckpt.pt")
    refused(scene.load(scene.folder / "ckpt.pt"), "ckpt.pt")


@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_an_evil_model_for_training(format: str, scene: Scene, refused: Refused) -> None:
    file = scene.folder / "ckpt.pt"
    FORMATS[format]({"model": {}, "optimizer": scene.evil(), "config": {}}, file)
    refused(scene.pretrain("--from-checkpoint", file), "ckpt.pt")


def test_an_evil_model_for_conversion(scene: Scene, refused: Refused) -> None:
    torch.save(scene.evil(), scene.folder / "ckpt.pt")
    refused(scene.convert(scene.folder / "ckpt.pt"), "ckpt.pt")


def test_an_evil_pytorch_model_bin(scene: Scene, refused: Refused) -> None:
    folder = scene.folder / "theirs"
    folder.mkdir()
    shutil.copy(scene.checkpoint / "config.json", folder)
    torch.save(scene.evil(), folder / "pytorch_model.bin")
    refused(scene.pretrain("--from-checkpoint", folder), "pytorch_model.bin")


@pytest.mark.parametrize("value", VALUES)
def test_a_model_of_strange_values(value: str, scene: Scene, refused: Refused) -> None:
    torch.save(VALUES[value], scene.folder / "ckpt.pt")
    refused(scene.load(scene.folder / "ckpt.pt"), "ckpt.pt")


@pytest.mark.parametrize("contents", BROKEN)
def test_a_broken_pickle(contents: str, scene: Scene, refused: Refused) -> None:
    (scene.folder / "ckpt.pt").write_bytes(BROKEN[contents])
    refused(scene.load(scene.folder / "ckpt.pt"), "ckpt.pt")


def moments(state: dict, change: Callable[[torch.Tensor], object]) -> dict:
    averages = state["optimizer"]["exp_avg"]
    name = next(iter(averages))
    return state | {"optimizer": state["optimizer"] | {"exp_avg": averages | {name: change(averages[name])}}}


STATES: dict[str, Callable[[dict], object]] = {
    "a list": lambda state: [state],
    "nothing": lambda state: {},
    "NaN steps": lambda state: state | {"step": float("nan")},
    "infinite steps": lambda state: state | {"step": float("inf")},
    "steps before 0": lambda state: state | {"step": -1},
    "steps beyond int64": lambda state: state | {"step": 10**30},
    "updates that are text": lambda state: state | {"optimizer": state["optimizer"] | {"step": "2"}},
    "no averages": lambda state: state | {"optimizer": {"step": 20}},
    "averages of text": lambda state: moments(state, lambda average: "x"),
    "complex averages": lambda state: moments(state, lambda average: average.to(torch.complex64)),
    "sparse averages": lambda state: moments(state, lambda average: average.to_sparse()),
    "averages without numbers": lambda state: moments(state, lambda average: average.to("meta")),
    "data of tensors": lambda state: state | {"data": {"--train-dir": torch.zeros(2)}},
    "runtime of text": lambda state: state | {"runtime": "x"},
    "wandb's id is a list": lambda state: state | {"wandb_id": ["x"]},
}


@pytest.mark.parametrize("format", ["zip", "legacy", "pickle"])
def test_an_evil_training_state(format: str, scene: Scene, refused: Refused) -> None:
    state = torch.load(scene.checkpoint / "training_state.pt", weights_only=True)
    FORMATS[format](state | {"data": scene.evil()}, scene.checkpoint / "training_state.pt")
    sign(scene.checkpoint)
    refused(scene.resume(), "training_state.pt")


@pytest.mark.parametrize("change", STATES)
def test_a_strange_training_state(change: str, scene: Scene, refused: Refused) -> None:
    state = torch.load(scene.checkpoint / "training_state.pt", weights_only=True)
    torch.save(STATES[change](state), scene.checkpoint / "training_state.pt")
    sign(scene.checkpoint)
    refused(scene.resume(), "training_state.pt")


def test_the_files_are_good_before_they_are_spoilt(scene: Scene, call: Call) -> None:
    sign(scene.checkpoint)
    assert call([*scene.resume(), "--train-dir", str(scene.train), "--valid-dir", str(scene.valid)]) == 0
    shutil.rmtree(scene.folder / "out")
    assert call(scene.pretrain()) == 0
    assert call(scene.load(scene.checkpoint)) == 0


def test_what_these_pickles_do_when_they_are_loaded(scene: Scene) -> None:
    for way in WAYS:
        result = pickle.loads(pickle.dumps(scene.evil(way)))
        if isinstance(result, subprocess.Popen):
            result.wait()
        assert scene.sentinel.exists(), way
        scene.sentinel.unlink()
