"""Which tokens begin and end a text: as the model's folder says, beside transformers, and kept through conversion and
training."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import prepare_documents, run_here, succeed, write_split
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gpt2xla.checkpoint.convert import convert
from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.config import ModelConfig
from gpt2xla.data.shards import Manifest
from gpt2xla.data.tokenizer import load_tokenizer, match_tokenizer
from gpt2xla.errors import InputError
from gpt2xla.generation.continuation import continue_texts
from gpt2xla.generation.sampling import GREEDY
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2

END, TURN, PAD = 256, 257, 258
CONFIG = ModelConfig(260, 16, 16, 1, 2)


def chat_model(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None, always: int = TURN) -> Path:
    """A model that always writes the token `always`, over bytes; its tokenizer ends a turn with <|im_end|>."""
    model = GPT2(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(model.wte.weight[always])
    folder.mkdir()
    hf.save_model(folder, CONFIG, model.state_dict(), GenerationSettings(config, generation))
    backend = load_tokenizer("bytes").backend
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|im_end|>", "<|pad|>", "<|im_start|>")])
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    stored = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", "model_max_length": 16, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(stored, indent=1))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{m.content}}<|im_end|>{% endfor %}"
    )
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        ({"eos_token_id": END}, {"eos_token_id": TURN}, {TURN}),
        ({"eos_token_id": TURN}, {"eos_token_id": [END, 65]}, {END, 65}),
        ({"eos_token_id": [END, TURN]}, None, {END, TURN}),
        ({"eos_token_id": END}, None, {END}),
        ({"eos_token_id": -1}, {"eos_token_id": -1}, set()),
        ({"eos_token_id": 50256}, {"eos_token_id": 50256}, {50256}),
    ],
)
def test_generation_stops_where_transformers_does(
    config: dict[str, Any], generation: dict[str, Any] | None, stops: set[int], tmp_path: Path
) -> None:
    """Whatever the tokenizer calls its end."""
    folder = chat_model(tmp_path / "model", config, generation)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    expected = theirs.generate(torch.tensor([[65]]), attention_mask=torch.ones(1, 1), max_new_tokens=5, do_sample=False)
    settings, tokenizer = GenerationSettings.load(folder), load_tokenizer(str(folder))
    assert settings.stop_ids(tokenizer.eot_id) == stops
    model = build_model(*load_weights(folder), folder)
    (text,) = continue_texts(model, tokenizer, ["A"], 5, GREEDY, settings=settings)
    assert text.tokens + (TURN in stops) == expected.shape[1] - 1
    assert text.text == "<|im_end|>" * text.tokens


def test_what_no_file_says_is_the_tokenizers() -> None:
    bytes_alone = load_tokenizer("bytes")
    for config, generation in (({}, None), ({"eos_token_id": None}, {"eos_token_id": None})):
        settings = GenerationSettings(config, generation)
        assert settings.stop_ids(bytes_alone.eot_id) == {256}
        assert settings.start_id(bytes_alone, 260) == 256
    assert GenerationSettings({"bos_token_id": 50256, "eos_token_id": [3, 2]}, None).start_id(bytes_alone, 257) == 256
    assert GenerationSettings({"bos_token_id": 7}, {"bos_token_id": 9}).start_id(bytes_alone, 260) == 9
    assert GenerationSettings({}, None).stop_ids(None) == frozenset()


def test_a_text_without_a_prompt_begins_as_in_transformers(tmp_path: Path) -> None:
    folder = chat_model(tmp_path / "model", {"bos_token_id": 7, "eos_token_id": TURN}, {"bos_token_id": 9})
    theirs = AutoModelForCausalLM.from_pretrained(folder).generate(max_new_tokens=1, do_sample=False)
    assert theirs[0, 0] == GenerationSettings.load(folder).start_id(load_tokenizer(str(folder)), 260) == 9


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '"x"',
        '{"eos_token_id": "2"}',
        '{"eos_token_id": 2.0}',
        '{"bos_token_id": true}',
        '{"eos_token_id": ["2"]}',
    ],
)
def test_a_damaged_file_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        GenerationSettings.load(tmp_path)


def same_to_transformers(source: Path, saved: Path) -> None:
    a, b = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(saved)
    for name in ("eos_token", "bos_token", "pad_token", "chat_template", "padding_side", "model_max_length"):
        assert getattr(a, name) == getattr(b, name), name
    c, d = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, saved))
    assert c.generation_config.to_dict() == d.generation_config.to_dict()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params"):
        assert getattr(c.config, name, None) == getattr(d.config, name, None), name
    names = ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
    for one, two in ((source / name, saved / name) for name in names):
        assert one.exists() == two.exists()
        if one.exists():
            assert one.read_bytes() == two.read_bytes(), one.name


GENERATION = {
    "eos_token_id": [TURN, END],
    "pad_token_id": PAD,
    "temperature": 0.7,
    "do_sample": True,
    "max_new_tokens": 12,
}


@pytest.mark.parametrize("generation", [GENERATION, None])
def test_a_converted_folder_keeps_what_lies_beside_the_weights(
    generation: dict[str, Any] | None, tmp_path: Path
) -> None:
    config = {
        "bos_token_id": END,
        "eos_token_id": TURN,
        "pad_token_id": PAD,
        "task_specific_params": {"x": {"top_k": 3}},
    }
    source = chat_model(tmp_path / "source", config, generation)
    for hop in ("one", "two"):
        convert(str(source), tmp_path / hop, None, lambda line: None)
        same_to_transformers(tmp_path / "source", tmp_path / hop)
        source = tmp_path / hop
    convert(str(source), tmp_path / "other", "bytes", lambda line: None)
    assert AutoTokenizer.from_pretrained(tmp_path / "other").eos_token_id == END
    assert GenerationConfig.from_pretrained(tmp_path / "other").eos_token_id == END


def test_a_run_keeps_them_too_from_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    source = chat_model(tmp_path / "source", {"bos_token_id": END, "eos_token_id": TURN}, GENERATION, always=65)
    tokens = np.random.default_rng(0).integers(0, 256, 600)
    write_split(tmp_path / "data", tokens, shards=1)
    flags = ["--train-dir", tmp_path / "data", "--valid-dir", tmp_path / "data", "--train-batch-size", 4]
    flags += ["--eval-batch-size", 4, "--gradient-accum-step", 1, "--valid-steps", 1, "--warmup-steps", 0]
    flags += ["--decay-steps", 4, "--save-interval", 2, "--valid-interval", 4, "--sample-interval", 4]

    def train(start: Path, steps: int, into: str) -> Path:
        run = ["--from-checkpoint", start, "--resume", "auto", "--checkpoints-dir", tmp_path / into]
        succeed(run_here("run_pretrain.py", *flags, *run, "--train-steps", steps))
        return tmp_path / into / f"step-{steps:08d}"

    unbroken = train(source, 4, "unbroken")
    train(source, 2, "broken")
    resumed = train(source, 4, "broken")
    names = {file.name for file in unbroken.iterdir()} - {"COMPLETE", "run_config.json", "training_state.pt"}
    assert {"generation_config.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert all((unbroken / name).read_bytes() == (resumed / name).read_bytes() for name in names)
    same_to_transformers(source, resumed)
    again = ["--from-checkpoint", resumed, "--resume", "never", "--checkpoints-dir", tmp_path / "again"]
    succeed(run_here("run_pretrain.py", *flags, *again, "--train-steps", 2))
    same_to_transformers(source, tmp_path / "again" / "step-00000002")
    other = ["--from-checkpoint", source, "--tokenizer", "bytes", "--checkpoints-dir", tmp_path / "other"]
    succeed(run_here("run_pretrain.py", *flags, *other, "--train-steps", 2))
    saved = tmp_path / "other" / "step-00000002"
    assert AutoTokenizer.from_pretrained(saved).eos_token_id == END
    assert GenerationConfig.from_pretrained(saved).eos_token_id == END
    assert not (saved / "chat_template.jinja").exists()


def test_data_of_another_tokenizer_than_the_models_is_refused_until_it_is_named(tmp_path: Path) -> None:
    source = chat_model(tmp_path / "source", {"eos_token_id": TURN}, None)
    data = prepare_documents(tmp_path / "data")
    manifest = Manifest.load(data / "train")
    assert manifest
    folders = [source, data / "train"]
    another = dataclasses.replace(manifest, tokenizer_sha256="0" * 64)
    with pytest.raises(
        InputError, match=f"of {source} is not the one that all shards .* name the shards' with --tokenizer"
    ):
        match_tokenizer(None, folders, [another], 260)
    extended = match_tokenizer(None, folders, [manifest], 260)
    assert extended
    assert extended.eot_id == TURN
    named = match_tokenizer("bytes", folders, [manifest], 260)
    assert named
    assert named.eot_id == END


def test_options_that_transformers_would_draw_by_are_named_and_neutral_ones_are_not() -> None:
    """Neutral are the values that transformers itself writes as defaults."""
    defaults = {"temperature": 1.0, "top_k": 0, "num_beams": 1, "bad_words_ids": None, "transformers_version": "5"}
    chosen = {"repetition_penalty": 1.2, "suppress_tokens": [3]}
    settings = GenerationSettings({}, {"eos_token_id": [1, 2], "do_sample": True} | defaults | chosen)
    assert settings.unused() == chosen


def test_a_run_takes_the_chat_template_of_its_data(tmp_path: Path) -> None:
    """The base model's tokenizer, which comes first, has none yet, or another one."""
    base = load_tokenizer("bytes")
    manifests = {}
    for name, template in (("base", None), ("old", "{{ messages }}"), ("train", "{{ bos_token }}"), ("other", "{# #}")):
        (tmp_path / name).mkdir()
        (base if template is None else base.with_chat_template(template)).save(tmp_path / name)
        manifests[name] = Manifest(
            tokenizer="bytes", tokenizer_sha256=base.sha256, vocab_size=257, eot_id=END, dtype="uint16", tokens=0,
            documents=0, bytes=0, shards=(), chat_template=template or "",
        )  # fmt: skip
    for model in ("base", "old"):
        folders = [tmp_path / model, tmp_path / "train"]
        found = match_tokenizer(None, folders, [manifests["train"], manifests["base"]], 260)
        assert found.chat_template == "{{ bos_token }}"
        found.save(tmp_path / model)
        assert load_tokenizer(str(tmp_path / model)).chat_template == "{{ bos_token }}"
    assert match_tokenizer(None, [tmp_path / "old"], [manifests["base"]], 260).chat_template == "{{ bos_token }}"
    with pytest.raises(InputError, match="different chat templates"):
        match_tokenizer(None, [tmp_path / "base"], [manifests["train"], manifests["other"]], 260)
