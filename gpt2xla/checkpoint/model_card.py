"""The README.md of a checkpoint or a converted model: the card that the Hugging Face hub shows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt2xla.checkpoint.logged import newest_line
from gpt2xla.config import ModelConfig, RunConfig
from gpt2xla.config.paths import is_url, parse_weights
from gpt2xla.data.batch_plan import BatchPlan
from gpt2xla.data.tokenizer import Tokenizer
from gpt2xla.logs.sinks import METRICS_FILE, perplexity
from gpt2xla.optim.schedule import describe

MODEL_CARD = "README.md"
_FRONT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- gpt2xla
---
"""
_RESUME = "\n## Continue training\n"
_SPLITS = ("train", "test", "valid", "validation", "val")  # folders that are named after a part of a data set


def card_of_run(
    config: RunConfig,
    weights: Mapping[str, Tensor],
    training: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    root: Path,
    devices: str,
) -> str:
    """Return the card of a checkpoint. The validation loss is the newest in `root`, the folder of the run, and the lowest
    until then if the checkpoint is the best one.

    Args:
        training: its training state."""
    step, train, plan = training["step"], config.train, BatchPlan.saved(training["data"])
    name, is_best = f"step-{step:08d}", training.get("best", {}).get("step") == step
    sizes = ", then ".join(f"{phase.sequences:,}" for phase in plan.phases if phase.from_step < max(step, 1))
    folders, shares = parse_weights("--train-dir", config.data.train_dir)
    parts = (f"{_name(f)} ({s:.0%})" if len(folders) > 1 else _name(f) for f, s in zip(folders, shares, strict=True))
    facts = {
        "steps": f"{step:,} of {train.train_steps:,}",
        "tokens seen": f"{plan.sequences_before(step) * config.model.seq_length:,} ({sizes} sequences a step)",
        "training data": ", ".join(parts),
        "validation data": _name(config.data.valid_dir),
        "schedule": describe(config.schedule),
        "optimizer": _optimizer(config),
        "precision": train.mixed_precision,
        "devices": devices,
    }
    if train.document_mask:
        facts["attention"] = "within documents, whose positions count from 0 (--document-mask)"
    if line := newest_line(root / METRICS_FILE, "valid_loss", step):
        loss = line["valid_loss"]
        facts["validation loss"] = (
            f"{loss:.4f} nats per token, perplexity {perplexity(loss):.2f}, after step {line['step']:,}"
        )
    if is_best:
        facts["best checkpoint"] = "yes: no validation of the run before had a lower loss"
    resume = f"""{_RESUME}
With gpt2xla's `run_pretrain.py`, in RUN, the folder that holds this one, or in a new one:

```bash
python run_pretrain.py --checkpoints-dir RUN
python run_pretrain.py --from-checkpoint RUN/{name} --checkpoints-dir continued
```
"""
    about = f"A GPT-2 language model, trained with gpt2xla. This is its checkpoint after step {step:,}."
    return _card(name, about, config.model, weights, tokenizer, facts) + resume


def published(card: str, folder: str, name: str, branch: str | None, loss: str, front: str, is_resumable: bool) -> str:
    """Return the card of a model in `folder` for the hub's repository `name`. What its user wrote into it stays.

    Args:
        loss: the section about its loss.
        front: the front matter to keep, such as a licence that was added on the hub; "" for the card's own."""
    own, rest = _split_front(card)
    if not is_resumable:
        rest = rest.split(_RESUME)[0]
    rest = rest.replace(f"# {folder}\n", f"# {name.split('/')[-1]}\n", 1)
    named = f'"{name}", revision="{branch}"' if branch else f'"{name}"'
    rest = rest.replace(f'"{folder}")  # the path of this folder', f"{named})")
    if not branch:
        rest = rest.replace(f"--model {folder}", f"--model {name}")
    return (_split_front(front)[0] or own) + f"{rest.rstrip()}\n\n## Loss\n\n{loss}\n"


def _split_front(card: str) -> tuple[str, str]:
    """Return the front matter, with its borders, and the rest."""
    found = re.match(r"---\n.*?\n---\n", card, re.DOTALL)
    return (found[0], card[found.end() :]) if found else ("", card)


def _optimizer(config: RunConfig) -> str:
    optim, clip = config.optim, config.optim.max_grad_norm
    parts = [optim.optim_type, f"betas {', '.join(map(str, optim.betas))}", f"weight decay {optim.weight_decay}"]
    return ", ".join([*parts, f"gradients clipped at {clip}"] if clip else parts)


def card_of_model(
    name: str, source: str, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer | None
) -> str:
    """Return the card of the converted model `name`, which comes from `source`."""
    about = f"A GPT-2 language model, converted by gpt2xla from {_name(source)}."
    return _card(name, about, config, weights, tokenizer, {})


def _card(
    name: str,
    about: str,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    facts: dict[str, str],
) -> str:
    padding = config.vocab_padding * config.d_model * (1 if config.tie_weights else 2)
    facts = {
        "parameters": f"{sum(weight.numel() for weight in weights.values()) - padding:,}",
        "layers, width, heads": f"{config.num_layers}, {config.d_model}, {config.num_heads}",
        "vocabulary": f"{config.real_vocab_size:,} ids",
        "context": f"{config.seq_length:,} tokens",
        "tokenizer": "in this folder" if tokenizer else "none is stored here",
    } | facts
    table = "\n".join(f"| {what} | {value} |" for what, value in facts.items())
    return f"{_FRONT}\n# {name}\n\n{about}\n\n| | |\n|---|---|\n{table}\n\n## Use\n\n{_use(name, tokenizer)}"


def _use(name: str, tokenizer: Tokenizer | None) -> str:
    language = "python"
    pipeline = f"""from transformers import pipeline

generate = pipeline("text-generation", model="{name}")  # the path of this folder"""
    if tokenizer is None:
        code = f"""from transformers import GPT2LMHeadModel

model = GPT2LMHeadModel.from_pretrained("{name}")  # the path of this folder"""
    elif tokenizer.sketches:
        language = "bash"
        code = f"""python generate.py --model {name} --draw WORD  # with gpt2xla
python scripts/recognise.py my-drawing.png --model {name}"""
    elif tokenizer.chat_template:
        code = f"""{pipeline}
messages = [{{"role": "user", "content": "What is a token?"}}]
print(generate(messages, max_new_tokens=100)[0]["generated_text"][-1]["content"])"""
    else:
        code = f"""{pipeline}
print(generate("Once upon a time", max_new_tokens=50)[0]["generated_text"])"""
    return f"```{language}\n{code}\n```\n\nNo license is stated here: add yours before you publish the model.\n"


def _name(place: str) -> str:
    """Return a name for a folder, file or hub id that says nothing about where on this machine it lies."""
    path = Path(place)
    if is_url(place) or not (path.is_absolute() or path.exists()):
        return place
    path = path.resolve() if path.name in ("", "..") else path
    return "/".join(path.parts[-2:]) if path.name in _SPLITS and len(path.parts) > 1 + path.is_absolute() else path.name
