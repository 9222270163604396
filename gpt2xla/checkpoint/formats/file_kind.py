"""Recognises model files and folders by their contents. Formats that are not supported are refused by name."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

from gpt2xla.data.shard_files.first_bytes import HEAD_BYTES, foreign
from gpt2xla.errors import InputError, user_error

Kind = Literal["safetensors", "torch", "llm.c"]

_TENSORFLOW = "load it with transformers 4 (from_pretrained with from_tf=True) and save it with save_pretrained"
_FLAX = "load it with transformers 4 (from_pretrained with from_flax=True) and save it with save_pretrained"
_CHOOSE = "choose another file"
# Fixes for formats that are not supported.
_FIXES = {
    "gguf": "give the model that it was made from",
    "hdf5": f"if it is TensorFlow's tf_model.h5, {_TENSORFLOW}",
    "numpy": "perhaps a shard of tokens: give a model",
}
# The first number of llm.c's files.
_LLMC = {
    20240326: "llm.c",
    20240327: "is llm.c's debug state, not a model; give its gpt2_124M.bin",
    20240328: "is llm.c's tokenizer, not a model; give its gpt2_124M.bin",
    20240520: "is llm.c's tokens, not a model; give its gpt2_124M.bin",
    20240522: "is llm.c's evaluation items, not a model; give its gpt2_124M.bin",
    20240527: "is llm.c's optimizer state, not a model; give the model_*.bin beside it",
    20240801: "is llm.c's tokens for Llama 3, not a model",
    20240803: "is llm.c's Llama 3, not a GPT-2",
}
_FILES = ("*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.bin")
# Folders without a model that is supported: the files that identify them, and what they are.
_FOLDERS = (
    (
        ("*.distcp", "*/*.distcp"),
        "a checkpoint of torch.distributed in parts; `python -m torch.distributed.checkpoint.format_utils dcp_to_torch` "
        "makes one file of it",
    ),
    (
        ("*mp_rank_*", "*/*mp_rank_*", "zero_to_fp32.py"),
        "a DeepSpeed checkpoint; its own zero_to_fp32.py makes one file of it",
    ),
    (
        ("*.ckpt.index", "*.ckpt-*.index", "*.ckpt.meta", "*.ckpt.data-*"),
        "a TensorFlow checkpoint, as OpenAI published; for OpenAI's own weights give gpt2 ... gpt2-xl, otherwise convert it "
        "with transformers 4 (load_tf_weights_in_gpt2)",
    ),
    (("tf_model*.h5",), f"a TensorFlow model; {_TENSORFLOW}"),
    (("flax_model*.msgpack",), f"a Flax model; {_FLAX}"),
    (("*.gguf",), "a GGUF model, for llama.cpp; give the model that it was made from"),
)


def kind_of(file: Path) -> Kind:
    """Return which reader a file needs. Raises InputError, with the format's name, if it is not supported."""
    with user_error(str(file)), file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    if not head:
        raise InputError(f"{file} is empty; copy it again")
    if head[:4] == b"PK\x03\x04":
        _refuse_other_archives(file)
        return "torch"
    if head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):  # a pickle: torch's older format
        return "torch"
    first = int.from_bytes(head[:4], "little")
    if (meaning := _LLMC.get(first)) == "llm.c":
        return "llm.c"
    if meaning is None and head[6:9] == b"\0\0{":  # after eight bytes with the header's length
        return "safetensors"
    raise InputError(f"{file} {meaning or _foreign(head, file.name)}")


def describe_folder(folder: Path, missing: str) -> str:
    """Say what a folder without the expected file `missing` is, and what to do."""
    for patterns, sentence in _FOLDERS:
        if any(found for pattern in patterns for found in folder.glob(pattern)):
            return f"{folder} is {sentence}"
    if models := [*folder.glob("checkpoint-*/config.json"), *folder.glob("snapshots/*/config.json")]:
        return f"{folder} has no {missing}; give the folder of one model in it, such as {max(models).parent}"
    files = sorted(file for pattern in _FILES for file in folder.glob(pattern))
    hint = f"give the file itself, such as {files[0]}" if files else "give the folder of a Hugging Face model"
    return f"{folder} has no {missing}; {hint}"


def _refuse_other_archives(file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        raise InputError(f"{file} is damaged or cut off; copy it again") from None
    if any(name.endswith("/constants.pkl") for name in names):
        raise InputError(f"{file} is a TorchScript program, not a checkpoint; save the model's state_dict instead")
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        raise InputError(f"{file} is a zip archive that torch did not write; unpack it first")


def _foreign(head: bytes, name: str) -> str:
    if found := foreign(head):
        return f"is {found.what}; {_FIXES.get(found.kind, found.fix or _CHOOSE)}"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html")):
        return "is a web page, not a model; download the file itself"
    if text.startswith(b"{"):
        return "is JSON text, not weights; give the folder of the model"
    # A map (0x81 ...) whose first key is text (0xa1 ... or 0xd9).
    if 0x81 <= head[0] <= 0x8F and head[1:2] and (0xA1 <= head[1] <= 0xBF or head[1] == 0xD9):
        return f"is a msgpack file, as Flax writes its models; {_FLAX}"
    if ".ckpt." in name or name.endswith((".index", ".meta")) or ".data-0" in name:
        return f"is a part of a TensorFlow checkpoint; {_TENSORFLOW}"
    if not any(head):
        return "begins with nothing but zeros, like a file that was not copied completely; copy it again"
    return "is not a known model file (safetensors, torch.save, llm.c); choose another, or copy it again"
