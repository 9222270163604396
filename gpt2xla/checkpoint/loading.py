"""Loads a model by the name that a user gives: finds its folder or file, reads the weights, and builds the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.checkpoint.formats.file_kind import kind_of
from gpt2xla.checkpoint.formats.hf_config import read_config
from gpt2xla.checkpoint.formats.llmc_file import load_llmc_model
from gpt2xla.checkpoint.formats.pt_file import load_pt_model
from gpt2xla.checkpoint.formats.stored_weights import StoredWeights
from gpt2xla.checkpoint.remote_models import fetched
from gpt2xla.checkpoint.run_folder import followed, list_checkpoints, refuse_unfinished
from gpt2xla.config import ModelConfig
from gpt2xla.config.paths import best_checkpoint, is_url
from gpt2xla.errors import InputError, user_error
from gpt2xla.model.gpt2 import GPT2, blank


def locate(name: str, *, with_training: bool = False) -> Path:
    """Return the folder or file that a user's `name` means: a path, a link such as `latest`, the newest checkpoint in
    a folder of checkpoints, the best one (FOLDER@best), an OpenAI size or a hub id. A model behind a URL is fetched, with
    the optimizer's state only if `with_training`. Raises InputError if there is no such model, and RunFailed if it could not
    be fetched."""
    if not name:
        raise InputError("the model's name is empty; give a folder, a .pt file, gpt2 ... gpt2-xl or a hub id")
    if is_url(name):
        return fetched(name, "--model", with_training=with_training)
    if best := best_checkpoint(name):
        return best
    path = Path(name)
    with user_error(name):  # no permission, or a name that is too long
        if path.is_file():
            return path
        if path.is_dir() and not (path / "config.json").exists() and (checkpoints := list_checkpoints(path)):
            return checkpoints[-1]
        refuse_unfinished(name)
        return followed(hf.find_folder(name))


def load_weights(source: Path) -> tuple[ModelConfig, StoredWeights]:
    """Return the model configuration and weights of a folder or file. Raises InputError if it holds no model."""
    if not source.is_file():
        return hf.load_model(source)
    if (part := re.search(r"-\d+-of-(\d+)\.", source.name)) and int(part[1]) > 1:
        raise InputError(f"{source} is one of the {int(part[1])} parts of a model; give its folder, {source.parent}")
    kind = kind_of(source)
    if kind == "llm.c":
        return load_llmc_model(source)
    if kind == "torch":
        return load_pt_model(source)
    # Shapes alone do not tell: models of equal shapes may differ in other ways, as Stanford's do in the scale of their
    # attention.
    if not (source.parent / "config.json").is_file():
        raise InputError(
            f"{source} holds only weights, and there is no config.json beside it: weights do not show the number of heads "
            "or the activation; copy the model's config.json there"
        )
    config, notes = read_config(source.parent)
    return hf.weights_in([source], source, config, notes)


def build_model(config: ModelConfig, weights: Mapping[str, Tensor], source: Path) -> GPT2:
    """Return the model with these weights, on the CPU, in fp32. It is filled tensor by tensor: there is one copy of them.

    A vocabulary that `config` pads gets rows of zeros, and positions beyond those of `config` are left out. Raises
    InputError if `source` cannot be read."""
    model = blank(config)
    with torch.no_grad(), user_error(str(source)):
        for name, parameter in model.named_parameters():
            stored = weights[name]
            rows = min(len(stored), len(parameter))
            parameter[:rows] = stored[:rows]
            parameter[rows:] = 0.0
    return model
