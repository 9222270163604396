"""Checkpoint folders are found, verified, pruned, refused, and never left half-written."""

import errno
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL_RUN, metrics
from transformers import AutoModelForCausalLM

from gpt2xla.checkpoint import folder as checkpoint
from gpt2xla.checkpoint import run_folder, seal
from gpt2xla.checkpoint.formats.pt_file import load_pt_model
from gpt2xla.checkpoint.loading import build_model, load_weights, locate
from gpt2xla.checkpoint.start import find_start
from gpt2xla.cli import parse_run
from gpt2xla.config import RunConfig, TorchConfig
from gpt2xla.errors import InputError
from gpt2xla.generation.settings import GenerationSettings


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


def options(root: Path, *flags: str) -> RunConfig:
    return parse_run(TorchConfig, ["--checkpoints-dir", str(root), *flags])[0]


def flip_a_bit(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


def test_a_run_leaves_whole_checkpoints_and_no_litter(trained: Path) -> None:
    assert sorted(file.name for file in trained.iterdir()) == [
        ".lock", "latest", "metrics.jsonl", "run_config.json", "step-00000010", "step-00000020"
    ]  # fmt: skip
    assert os.readlink(trained / "latest") == "step-00000020"
    assert [folder.name for folder in run_folder.list_checkpoints(trained)] == ["step-00000010", "step-00000020"]
    assert all(seal.find_damage(folder) is None for folder in run_folder.list_checkpoints(trained))


def test_auto_takes_the_newest_and_flags_not_given_come_from_it(root: Path) -> None:
    start = find_start(options(root))
    assert start.step == 20
    assert (start.config.model.d_model, start.config.model.num_layers, start.config.model.vocab_size) == (32, 2, 97)
    assert start.training is not None
    assert start.training["optimizer"]["step"] == 20


@pytest.mark.parametrize(
    "name", ["model.safetensors", "training_state.pt", "config.json", "run_config.json", "COMPLETE"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_auto_skips_a_damaged_one_and_names_the_file(root: Path, name: str, damage: str) -> None:
    file = root / "step-00000020" / name
    if damage == "flip":
        flip_a_bit(file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        file.unlink()
    start = find_start(options(root))
    assert start.step == 10
    with pytest.raises(InputError) as error:
        find_start(options(root, "--resume", str(root / "step-00000020")))
    assert name in str(error.value)
    if name != "COMPLETE":
        assert str(file) in start.notes[0]


def test_auto_does_not_start_from_scratch_if_all_are_damaged(root: Path) -> None:
    for folder in run_folder.list_checkpoints(root):
        flip_a_bit(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole"):
        find_start(options(root))


def test_never_does_not_mix_two_runs(root: Path) -> None:
    with pytest.raises(InputError, match="already holds step-00000020"):
        find_start(options(root, "--resume", "never"))
    other = Path(shutil.copytree(root, root.with_name("other")))
    with pytest.raises(InputError, match="already holds step-00000020"):
        find_start(options(root, "--resume", str(other / "step-00000010")))


def test_from_checkpoint_continues_or_with_never_takes_only_weights(root: Path, tmp_path: Path) -> None:
    source = str(root / "step-00000010")
    assert find_start(options(tmp_path / "new", "--from-checkpoint", source)).step == 10
    start = find_start(options(tmp_path / "new", "--from-checkpoint", source, "--resume", "never"))
    assert (start.step, start.training) == (0, None)
    assert start.weights is not None
    start = find_start(options(tmp_path / "new", "--from-checkpoint", str(root)))
    assert start.step == 20, "a folder of checkpoints means its newest"


def test_a_missing_path_is_refused_even_if_the_run_resumes_without_it(root: Path, tmp_path: Path) -> None:
    """A name that the hub may know is not looked up then, so a run that began with it can resume offline."""
    (tmp_path / "c1" / "step-00000001").mkdir(parents=True)
    wrong = (root / "step-00000030", root / "nope", "./none", "none/of/these", tmp_path / "c1" / "nope", "ckpt.pt")
    for checkpoints in (root, tmp_path / "new"):
        for name in map(str, wrong):
            with pytest.raises(InputError, match=f"--from-checkpoint {re.escape(name)}: no such folder or file"):
                find_start(options(checkpoints, "--from-checkpoint", name))
    with pytest.raises(InputError, match="--from-checkpoint is empty"):
        options(root, "--from-checkpoint", "")
    for name in ("gpt2", "distilgpt2", "me/model"):
        assert find_start(options(root, "--from-checkpoint", name)).step == 20


def test_a_folder_here_is_no_owner_on_the_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    with pytest.raises(InputError, match=f"--from-checkpoint {root.name}/nope: no such folder or file"):
        find_start(options(root, "--from-checkpoint", f"{root.name}/nope"))


def test_a_contradicting_flag_is_refused_with_both_values(root: Path) -> None:
    with pytest.raises(InputError, match=r"--d-model 64 contradicts .*step-00000020, where it is 32"):
        find_start(options(root, "--d-model", "64"))
    assert find_start(options(root, "--d-model", "32", "--dropout", "0.3")).config.model.dropout == 0.3


def test_a_resumed_run_keeps_its_options_except_those_given_again(root: Path, data_flags: list[str]) -> None:
    start = find_start(options(root, "--learning-rate", "0.5", "--shuffle"))
    config = start.config
    assert config.optim.learning_rate == 0.5
    assert (config.optim.min_lr, config.optim.max_grad_norm, config.train.gradient_accum_step) == (0.001, 0.5, 3)
    assert ["--train-dir", *config.data.train_dir] == data_flags[:2]
    assert sorted(start.notes) == ["changed: --learning-rate 0.01 -> 0.5", "changed: --shuffle False -> True"]


def test_going_back_to_an_older_one_sets_the_newer_aside(root: Path) -> None:
    with pytest.raises(InputError, match=r"older than step-00000020 beside it; .* use --resume"):
        find_start(options(root, "--from-checkpoint", str(root / "step-00000010")))
    assert find_start(options(root, "--resume", str(root / "step-00000010"))).step == 10
    (root / ".step-00000030.partial").mkdir()
    assert run_folder.prepare_folder(root, 10) == ["set aside: step-00000020 is now abandoned-1-step-00000020"]
    assert sorted(file.name for file in root.iterdir()) == [
        ".lock", "abandoned-1-metrics.jsonl", "abandoned-1-step-00000020", "latest", "metrics.jsonl", "run_config.json",
        "step-00000010",
    ]  # fmt: skip
    assert os.readlink(root / "latest") == "step-00000010"
    assert find_start(options(root)).step == 10


def test_pruning_keeps_the_newest(root: Path) -> None:
    for step in (30, 40):
        shutil.copytree(root / "step-00000020", root / f"step-{step:08d}")
    run_folder.prune(root, root / "step-00000040", 0)
    assert len(run_folder.list_checkpoints(root)) == 4
    run_folder.prune(root, root / "step-00000040", 2)
    assert [folder.name for folder in run_folder.list_checkpoints(root)] == ["step-00000030", "step-00000040"]


def test_those_set_aside_count_in_the_limit_and_are_deleted_first_by_name(root: Path) -> None:
    shutil.copytree(root / "step-00000020", root / "step-00000030")
    run_folder.prepare_folder(root, 10)
    shutil.copytree(root / "step-00000010", root / "step-00000015")
    run_folder.prepare_folder(root, 10)
    shutil.copytree(root / "step-00000010", root / "step-best")  # the user's
    aside = ["abandoned-1-step-00000020", "abandoned-1-step-00000030", "abandoned-2-step-00000015"]
    assert [folder.name for folder in run_folder.list_abandoned(root)] == aside
    newest = Path(shutil.copytree(root / "step-00000010", root / "step-00000012"))
    assert run_folder.prune(root, newest, 3) == [f"removed: {name} (--saved-checkpoint-limit 3)" for name in aside[:2]]
    assert run_folder.prune(root, newest, 1) == [f"removed: {aside[2]} (--saved-checkpoint-limit 1)"]
    assert run_folder.list_checkpoints(root) == [newest]
    run_folder.prepare_folder(root, 10)
    assert (root / "step-best").is_dir()


def test_the_link_to_the_newest_is_repaired_and_means_its_folder(root: Path) -> None:
    latest, newest = root / "latest", root / "step-00000020"
    for flags in (["--resume", latest], ["--from-checkpoint", latest], ["--from-checkpoint", f"{latest}/"]):
        assert find_start(options(root, *map(str, flags))).source == newest
    assert locate(str(latest)) == newest
    latest.unlink()
    latest.symlink_to("step-00000099")  # as a crash, or a user, may leave it
    (root / ".latest.1.partial").symlink_to("step-00000099")
    run_folder.prepare_folder(root, 20)
    assert latest.resolve() == newest
    assert not list(root.glob(".latest*"))
    shutil.rmtree(root / "step-00000010")
    shutil.rmtree(newest)
    run_folder.prepare_folder(root, 0)
    assert not latest.is_symlink()


def test_without_links_there_is_a_line_and_nothing_of_the_users_is_replaced(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", refuse)
        line = run_folder.point(root / "latest", root / "step-00000010")
    folder = root / "step-00000010"
    assert line == f"no link {root}/latest (Operation not permitted); give the folder itself, such as {folder}"
    assert os.readlink(root / "latest") == "step-00000020"
    (root / "mine").mkdir()
    assert "mine is no link, and stays as it is" in (run_folder.point(root / "mine", folder) or "")


def test_a_run_without_a_checkpoint_yet_says_when_it_saves(root: Path) -> None:
    for folder in run_folder.list_checkpoints(root):
        shutil.rmtree(folder)
    for interval, when in ((7, "saves every 7 steps, next after step 20"), (0, "saves after step 20")):
        values = json.loads((root / "run_config.json").read_text()) | {"save_interval": interval}
        (root / "run_config.json").write_text(json.dumps(values))
        message = f"{root} holds no finished checkpoint yet; its run is at step 20 and {when}"
        for read in (locate, run_folder.refuse_unfinished):
            with pytest.raises(InputError, match=re.escape(message)):
                read(str(root))
        with pytest.raises(InputError, match=re.escape(f"--from-checkpoint {message}")):
            find_start(options(root.with_name("new"), "--from-checkpoint", str(root)))


def test_evaluations_that_were_made_up_for_are_noted_without_another_save(root: Path) -> None:
    folder = root / "step-00000020"
    training = torch.load(folder / "training_state.pt", weights_only=True)
    torch.save(training | {"is_evaluated": False}, folder / "training_state.pt")
    rehash(folder)
    start = find_start(options(root))
    assert not start.is_evaluated
    checkpoint.mark_evaluated(folder, start.best.state())
    assert find_start(options(root)).is_evaluated
    assert seal.find_damage(folder) is None


def test_every_checkpoint_has_a_model_card(trained: Path, data: Path) -> None:
    text = (trained / "step-00000020" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2", "gpt2xla"]
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(trained / "step-00000020")
    loss = [line["valid_loss"] for line in metrics(trained) if "valid_loss" in line][-1]
    for fact in (
        f"| parameters | {model.num_parameters():,} |",
        "| tokens seen | 3,840 (12 sequences a step) |",
        f"| training data | {data.name}/train |",
        f"| validation loss | {loss:.4f} nats per token, perplexity {np.exp(loss):.2f}, after step 20 |",
    ):
        assert fact in body
    assert str(data) not in text
    assert "README.md" in json.loads((trained / "step-00000020" / "COMPLETE").read_text())["files"]


def test_a_checkpoint_that_was_tampered_with_to_look_whole_is_refused(root: Path) -> None:
    """The hashes match but the contents do not: the result is one line, not a traceback."""
    folder = root / "step-00000020"
    shutil.rmtree(root / "step-00000010")
    original = torch.load(folder / "training_state.pt", weights_only=True)
    damaged = {"step": "x"}, {"optimizer": {}}, {"optimizer": original["optimizer"] | {"exp_avg": {}}}
    for contents in ([1], *(original | part for part in damaged)):
        torch.save(contents, folder / "training_state.pt")
        rehash(folder)
        with pytest.raises(InputError, match=r"training_state\.pt"):
            find_start(options(root))
    for name, text in (("config.json", "null"), ("run_config.json", "[1]")):
        kept = (folder / name).read_text()
        (folder / name).write_text(text)
        rehash(folder)
        with pytest.raises(InputError, match=name):
            find_start(options(root))
        (folder / name).write_text(kept)


def rehash(folder: Path) -> None:
    seal.seal(folder, seal.step_of(folder))


def test_nothing_is_pruned_while_the_newest_is_damaged(root: Path) -> None:
    flip_a_bit(root / "step-00000020" / "model.safetensors")
    with pytest.raises(OSError, match="no older one was deleted"):
        run_folder.prune(root, root / "step-00000020", 1)
    assert seal.find_damage(root / "step-00000010") is None


def test_a_crash_while_writing_leaves_the_old_ones_and_is_cleaned_up(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = find_start(options(root))
    assert start.weights is not None
    assert start.training is not None
    saved = {"weights": start.weights, "training": start.training | {"step": 30}, "tokenizer": None}
    saved |= {"settings": GenerationSettings.of(None), "devices": "a CPU", "shards": run_folder.shards_folder(root, 30)}
    config = options(root, *SMALL_RUN)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(root, config=config, **saved)
    assert find_start(options(root)).step == 20
    checkpoint.save(root, config=config, **saved)
    assert find_start(options(root)).step == 30
    assert not list(root.glob(".step-*"))


def test_hugging_face_loads_the_folder_with_equal_logits(trained: Path) -> None:
    folder = trained / "latest"
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    config, weights = load_weights(folder)
    ours = build_model(config, weights, folder).eval()
    ids = torch.arange(16)[None]
    torch.testing.assert_close(theirs(ids).logits, ours.logits(ids), rtol=0, atol=1e-5)
    assert theirs.lm_head.weight is theirs.transformer.wte.weight


class Sentinel:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/gpt2xla-was-unpickled"),))


def test_a_strangers_pt_file_is_not_unpickled(tmp_path: Path) -> None:
    for file in (tmp_path / "torch.pt", tmp_path / "plain.pt"):
        with file.open("wb") as stream:
            (torch.save if file.stem == "torch" else pickle.dump)({"model": Sentinel()}, stream)
        with pytest.raises(InputError, match="nothing in it was run"):
            load_pt_model(file)
    assert not Path("/tmp/gpt2xla-was-unpickled").exists()


def test_the_common_pt_layout_is_read(tmp_path: Path, trained: Path) -> None:
    """Compare names and config keys of that layout with the same weights in ours."""
    config, weights = load_weights(trained / "step-00000020")
    rename = {
        "wte.": "token_embedding.", "wpe.": "positional_embedding.", "ln_f.": "layer_norm.", "h.": "decoder_blocks.",
        "attn.c_attn.": "causal_self_attention.w_qkv.", "attn.c_proj.": "causal_self_attention.rl_projection.",
        "mlp.c_fc.": "position_wise_ffn.linear.", "mlp.c_proj.": "position_wise_ffn.rl_projection.",
        "ln_1.": "layer_norm_1.", "ln_2.": "layer_norm_2.",
    }  # fmt: skip
    theirs = {}
    for name, tensor in weights.items():
        for ours, other in rename.items():
            if name.startswith(ours) or ours not in ("h.", "wte.", "wpe."):
                name = name.replace(ours, other, 1)
        theirs[f"_orig_mod.{name}"] = tensor
    theirs["_orig_mod.lm_head.weight"] = weights["wte.weight"]
    theirs["_orig_mod.decoder_blocks.0.causal_self_attention.causal_mask"] = torch.ones(1, 1, 16, 16)
    values = {
        "vocab_size": 97, "seq_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 128, "dropout": 0.0,
        "activation": "gelu", "tie_weights": True, "eps": 1e-5,
    }  # fmt: skip
    file = tmp_path / "gpt2-20.pt"
    torch.save({"model": theirs, "optimizer": {}, "lr_scheduler": {}, "config": values, "global_step": 20}, file)
    read_config, read = load_pt_model(file)
    assert read_config == config
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_run_config_records_every_option(trained: Path) -> None:
    values = json.loads((trained / "step-00000020" / "run_config.json").read_text())
    assert values["gradient_accum_step"] == 3
    assert values.keys() == RunConfig().to_flat().keys()
