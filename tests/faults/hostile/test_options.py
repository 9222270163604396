"""Tokenizers, configuration files and file names."""

from __future__ import annotations

import json
import os

import pytest
from conftest import run

from faults.hostile.conftest import Refused
from faults.hostile.scene import DEEP, Scene


def bpe(vocab: object, merges: object = ()) -> str:
    return json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": merges}})


TOKENIZER = {
    "deep": DEEP,
    "no bytes": "",
    "null": "null",
    "a list": "[]",
    "no words": bpe({}),
    "negative ids": bpe({"a": -1}),
    "id 2^32 - 1": bpe({"a": 2**32 - 1}),
    "ids beyond int64": bpe({"a": 10**30}),
    "merges of unknown words": bpe({"a": 0}, [["x", "y"]]),
    "a word list": json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": [1], "unk_token": 3}}),
}
TOKENIZER_CONFIG = {
    "deep": DEEP,
    "a list": "[]",
    "strange values": json.dumps({"name_or_path": {"a": 1}, "eos_token": [[]], "bos_token": 7}),
}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
YAML = {
    "a call": "seed: !!python/object/apply:os.system ['touch SENTINEL']",
    "a process": "seed: !!python/object/apply:subprocess.Popen [['touch', 'SENTINEL']]",
    "an object": '!!python/object/new:builtins.exec [\'open("SENTINEL", "w")\']',
    "a module": "seed: !!python/module:antigravity",
    "a name": "seed: !!python/name:os.system",
    "its own tag": "seed: !evil 5",
    "a billion aliases": BOMB,
    "a list that holds itself": "train_dir: &a [*a]",
    "a mapping that holds itself": "&a\nseed: *a",
    "deep": DEEP,
    "deep mappings": "{a: " * 50_000,
    "a 13th month": "seed: 2001-13-40",
    "bytes": "seed: !!binary aGVsbG8=",
    "a set": "seed: !!set {a, b}",
    "a NUL in a name": 'tokenizer: "a\\0b"',
    "half a character in a name": 'tokenizer: "\\ud800"',
    "a number of 5,000 digits": "seed: " + "9" * 5000,
    "a key that is a list": "? [a, b]\n: 5",
    "two documents": "seed: 1\n---\nseed: 2\n",
}


@pytest.mark.parametrize("contents", TOKENIZER)
def test_tokenizer_json(contents: str, scene: Scene, refused: Refused) -> None:
    (scene.folder / "tokenizer.json").write_text(TOKENIZER[contents])
    refused(scene.pretrain("--tokenizer", scene.folder / "tokenizer.json"), "tokenizer")


@pytest.mark.parametrize("contents", TOKENIZER_CONFIG)
def test_tokenizer_config_json(contents: str, scene: Scene, refused: Refused) -> None:
    """The file is optional. If the vocabulary does not fit either, the message may name that instead."""
    folder = scene.folder / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(bpe({"a": 500}))
    (folder / "tokenizer_config.json").write_text(TOKENIZER_CONFIG[contents])
    refused(scene.pretrain("--tokenizer", folder), "okenizer")


@pytest.mark.parametrize("contents", YAML)
def test_yaml(contents: str, scene: Scene, refused: Refused) -> None:
    text = YAML[contents]
    (scene.folder / "run.yaml").write_text(text.replace("SENTINEL", str(scene.sentinel)), encoding="utf-8")
    refused(scene.pretrain("--config", scene.folder / "run.yaml"), "--tokenizer" if "tokenizer" in text else "run.yaml")


def test_a_folder_whose_name_is_not_text(scene: Scene) -> None:
    out = os.fsdecode(os.fsencode(scene.folder) + b"/\xff")
    result = run(*scene.pretrain("--checkpoints-dir", out), PYTHONIOENCODING="utf-8:strict")
    assert result.returncode == 0, result.stderr
    assert "\\udcff" in result.stdout
