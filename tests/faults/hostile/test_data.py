"""Shards and their manifests."""

from __future__ import annotations

import io
import pickle
import shutil
import struct
from collections.abc import Callable

import numpy as np
import pytest

from faults.hostile.conftest import Refused
from faults.hostile.scene import DEEP, Scene, changed


def npy(header: bytes, version: bytes = b"\x01\x00", data: bytes = bytes(4000)) -> bytes:
    size = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    return b"\x93NUMPY" + version + size + header + data


def described(descr: str = "'<u2'", shape: str = "(2000,)") -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode())


def objects(scene: Scene) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([scene.evil()] * 3, dtype=object), allow_pickle=True)
    return stream.getvalue()


def npz(scene: Scene) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.array([scene.evil()], dtype=object))
    return stream.getvalue()


def code(scene: Scene) -> str:
    return f"__import__('os').system('touch {scene.sentinel}')"


def llmc(*numbers: int) -> bytes:
    return np.array([20240520, 1, *numbers], "<i4").tobytes()


EVIL: dict[str, Callable[[Scene], bytes]] = {
    "pickled objects": objects,
    "a pickle": lambda scene: pickle.dumps(scene.evil()),
    "a zip of arrays": npz,
    "code for a header": lambda scene: npy(f"{code(scene)}\n".encode()),
    "code for a type": lambda scene: described(code(scene)),
}
NPY = {
    "objects by header": described("'|O'"),
    "fields": described("[('a', '<u2'), ('b', '|O')]"),
    "deep header": npy(b"(" * 9_000 + b"\n"),
    "deep signs": npy(b"-" * 9_000 + b"1\n"),
    "header beyond the file": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1),
    "version 9": npy(b"{}", b"\x09\x00"),
    "shape of 2^62": described(shape="(4611686018427387904,)"),
    "shape beyond int64": described(shape=f"({10**30},)"),
    "negative shape": described(shape="(-1,)"),
    "shape of truths": described(shape="(True,)"),
    "shape of text": described(shape="'x'"),
    "no shape": described(shape="()"),
    "fractions": described("'<f8'"),
    "times": described("'<M8[s]'"),
    "no bytes": b"",
    "nothing in it": described(shape="(0,)"),
}
BIN = {
    "negative tokens": llmc(-5, *[0] * 253),
    "2^31 - 1 tokens": llmc(2**31 - 1, *[0] * 253),
    "half a header": llmc(5),
    "no bytes": b"",
    "an odd byte": bytes(4001),
}


def shard(scene: Scene, contents: bytes, name: str) -> list[str]:
    """Make it the only file for training."""
    shutil.rmtree(scene.train)
    scene.train.mkdir()
    (scene.train / name).write_bytes(contents)
    return scene.pretrain()


@pytest.mark.parametrize("contents", EVIL)
def test_an_evil_npy(contents: str, scene: Scene, refused: Refused) -> None:
    refused(shard(scene, EVIL[contents](scene), "shard_000000.npy"), str(scene.train))


@pytest.mark.parametrize("contents", NPY)
def test_a_strange_npy(contents: str, scene: Scene, refused: Refused) -> None:
    refused(shard(scene, NPY[contents], "shard_000000.npy"), str(scene.train))


@pytest.mark.parametrize("contents", BIN)
def test_a_strange_bin(contents: str, scene: Scene, refused: Refused) -> None:
    refused(shard(scene, BIN[contents], "train.bin"), str(scene.train))


NAMES = ("../../x.npy", "/etc/passwd", "..", ".", "", "a/b.npy", "./shard_000000.npy", "x\0.npy", None, 5)
MANIFESTS: dict[str, Callable[[dict], object] | str] = {
    "deep": DEEP,
    "no bytes": "",
    "a list": lambda values: [values],
    "null": "null",
    "further entries": lambda values: values | {"__class__": "os.system"},
    "NaN tokens": lambda values: values | {"tokens": float("nan")},
    "infinite tokens": lambda values: values | {"tokens": float("inf")},
    "negative tokens": lambda values: values | {"tokens": -1},
    "a number of 5,000 digits": '{"tokens": ' + "9" * 5000 + "}",
    "tokens beyond int64": lambda values: values | {"tokens": 10**30},
    "no vocabulary": lambda values: values | {"vocab_size": 0},
    "huge vocabulary": lambda values: values | {"vocab_size": 10**30},
    "dtype of objects": lambda values: values | {"dtype": "object"},
    "no shards": lambda values: values | {"shards": []},
    "shards of text": lambda values: values | {"shards": "abc"},
    "shards of nothing": lambda values: values | {"shards": None},
}


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_manifest_that_names_a_strange_shard(name: object, scene: Scene, refused: Refused) -> None:
    file = scene.train / "manifest.json"
    file.write_text(changed(file, lambda values: values | {"shards": [values["shards"][0] | {"file": name}]}))
    refused(scene.pretrain(), str(scene.train))


@pytest.mark.parametrize("change", MANIFESTS)
def test_a_strange_manifest(change: str, scene: Scene, refused: Refused) -> None:
    file = scene.train / "manifest.json"
    file.write_text(changed(file, MANIFESTS[change]))
    refused(scene.pretrain(), str(scene.train))


@pytest.mark.parametrize("target", ["/etc/passwd", "itself"])
def test_a_shard_that_is_a_link(target: str, scene: Scene, refused: Refused) -> None:
    first = min(scene.train.glob("*.npy"))
    first.unlink()
    first.symlink_to(first if target == "itself" else target)
    refused(scene.pretrain(), first.name)


def test_a_manifest_that_is_a_folder(scene: Scene, refused: Refused) -> None:
    (scene.train / "manifest.json").unlink()
    (scene.train / "manifest.json").mkdir()
    refused(scene.pretrain(), "manifest.json")
