"""Commands that others published run here as they are written: nothing is changed in them but paths and sizes.

They are those of the README of github.com/minhnguyent546/pre-training-gpt2. What of them needs a TPU or a GPU runs with the
same options on the CPU instead: in the torch runtime and, in the slow tests, on XLA:CPU and under torchrun. Shards in the
conventions of github.com/karpathy/build-nanogpt and nanoGPT are read as they are, too; nanoGPT's own command lines
(`python train.py config/...`) are for its own script.
"""

from __future__ import annotations

import io
import json
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import metrics, run_here, run_xla, succeed, torchrun, training_losses
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2xla.cli import parse_run
from gpt2xla.config import TorchConfig, XlaConfig
from gpt2xla.data.shards import TokenStream
from gpt2xla.errors import InputError
from gpt2xla.runtime.torch.runtime import TorchRuntime
from gpt2xla.runtime.xla import environment as xla_environment
from gpt2xla.training.pretrain import pretrain

PREPARE = r"""
python scripts/prepare_fineweb.py \
    --seed 1061109567 \
    --tokenizer gpt2 \
    --shard-size 100000000 \
    --output-dir ./fineweb_10BT \
    --num-workers 4
"""
TRAIN = r"""
python run_pretrain.py \
    --checkpoints-dir ./checkpoints \
    --seed 1061109567 \
    --train-dir ./fineweb_10BT/train \
    --valid-dir ./fineweb_10BT/test \
    --vocab-size 50304 \
    --seq-length 1024 \
    --d-model 768 \
    --num-layers 12 \
    --num-heads 12 \
    --d-ff 3072 \
    --activation gelu \
    --tie-weights \
    --wandb-logging \
    --wandb-project pre-training-gpt2 \
    --wandb-name gpt2-124m \
    --wandb-logging-interval 100 \
    --optim-type adamw \
    --learning-rate 0.0006 \
    --betas 0.9 0.95 \
    --weight-decay 0.1 \
    --decay-method cosine \
    --warmup-steps 750 \
    --min-lr 0.00006 \
    --decay-steps 20000 \
    --train-batch-size 256 \
    --eval-batch-size 256 \
    --gradient-accum-step 1 \
    --mixed-precision bf16 \
    --train-steps 20000 \
    --valid-steps 100 \
    --valid-interval 500 \
    --save-interval 1000 \
    --saved-checkpoint-limit 6 \
    --max-grad-norm 1.0
"""
TWO_GPUS = "torchrun --standalone --nproc_per_node=2 run_pretrain.py"
TPU = r"""
PJRT_DEVICE=TPU python run_pretrain_xla.py \
    --mp-start-method spawn \
    --use-syncfree-optim
"""
XLA_ON_CUDA = r"""
PJRT_DEVICE=CUDA GPU_NUM_DEVICES=2 python run_pretrain_xla.py \
    --mp-start-method spawn  # CUDA devices are not visible across processes when using fork
"""
GENERATE = r"""
python generate.py \
    --model /path/to/checkpoint.pt \
    --tokenizer gpt2 \
    --seed 42 \
    --max-new-tokens 40 \
    --temperature 0.75 \
    --top-k 40 \
    --top-p 0.95
"""
BASELINE = r"""
PJRT_DEVICE=CUDA GPU_NUM_DEVICES=2 python run_pretrain_xla.py \
    --do-test \
    --seed 1061109567 \
    --train-dir ./fineweb_10BT/train \
    --valid-dir ./fineweb_10BT/test \
    --vocab-size 50304 \
    --seq-length 1024 \
    --d-model 768 \
    --num-layers 12 \
    --num-heads 12 \
    --d-ff 3072 \
    --activation gelu \
    --tie-weights \
    --matmul-precision high \
    --eval-batch-size 8 \
    --mixed-precision fp16 \
    --valid-steps 500 \
    --mp-start-method spawn \
    --from-checkpoint gpt2
"""

SIZES = {
    "--vocab-size": 512, "--seq-length": 16, "--d-model": 32, "--num-layers": 2, "--num-heads": 2, "--d-ff": 128,
    "--train-batch-size": 4, "--eval-batch-size": 4, "--gradient-accum-step": 2, "--train-steps": 3, "--warmup-steps": 1,
    "--decay-steps": 3, "--valid-steps": 3, "--valid-interval": 2, "--save-interval": 2, "--wandb-logging-interval": 2,
}  # fmt: skip
PATHS = ("--checkpoints-dir", "--train-dir", "--valid-dir", "--output-dir", "--model", "--from-checkpoint", "--input")
REST = ("--shard-size", "--num-workers", "--max-new-tokens")


def split(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "), comments=True)


def words_of(command: str, changes: dict[str, Any]) -> list[str]:
    """The words after the program, with other paths and sizes; those that the command leaves to defaults are added."""
    assert changes.keys() <= {*SIZES, *PATHS, *REST}
    words = split(command)
    words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 :]
    for flag, value in changes.items():
        if flag in words:
            words[words.index(flag) + 1] = str(value)
        else:
            words += [flag, str(value)]
    return words


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Any]:
    """Paths of a data set of 497 ids, and of a folder for checkpoints."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4000), ("test", 16 * 24 + 1)):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "fineweb_0000.npy", rng.integers(0, 497, count, dtype=np.uint16))
    return {
        "--train-dir": tmp_path / "train", "--valid-dir": tmp_path / "test", "--checkpoints-dir": tmp_path / "checkpoints",
    }  # fmt: skip


def test_prepare(tmp_path: Path, gpt2_encoding: str) -> None:
    """FineWeb itself is a terabyte: --input names local files to take instead, in its format."""
    import tiktoken

    texts = [f"Document {i}: the quick brown fox jumps over the lazy dog {i} times." for i in range(40)]
    file = tmp_path / "fineweb.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "fineweb_10BT"
    changes = {"--output-dir": out, "--shard-size": 200, "--num-workers": 2, "--input": file}
    succeed(run_here("scripts/prepare_fineweb.py", *words_of(PREPARE, changes)))
    encoding = tiktoken.get_encoding("gpt2")
    found = []
    for split in ("train", "test"):
        stream = TokenStream(out / split)
        found += encoding.decode(stream.read(0, stream.length).tolist()).split("<|endoftext|>")
    assert sorted(text for text in found if text) == sorted(texts)


def test_train(places: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[int] = []
    wandb = types.ModuleType("wandb")
    wandb.Settings = types.SimpleNamespace  # type: ignore[attr-defined]
    wandb.init = lambda **settings: types.SimpleNamespace(  # type: ignore[attr-defined]
        settings=settings, offline=True, step=0, summary={}, log=lambda values, step: logged.append(step),
        finish=lambda **how: None,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    text = succeed(run_here("run_pretrain.py", *words_of(TRAIN, SIZES | places)))
    assert "precision: bf16" in text
    folder = places["--checkpoints-dir"]
    assert len(training_losses(folder)) == 3
    assert max(logged) == 3
    assert json.loads((folder / "step-00000003" / "config.json").read_text())["activation_function"] == "gelu_new"


def test_defaults_are_the_published_recipe() -> None:
    """So that the commands that leave options out train the same model."""
    recipe, bare = (
        parse_run(TorchConfig, words)[0].to_flat() for words in (words_of(TRAIN, {}), words_of(TWO_GPUS, {}))
    )
    differing = {name for name in bare if bare[name] != recipe[name]}
    assert differing == {
        "mixed_precision", "train_batch_size", "eval_batch_size", "gradient_accum_step", "sequences_per_update",
        "wandb_logging", "wandb_name", "wandb_project",
    }  # fmt: skip
    assert recipe["train_batch_size"] * recipe["gradient_accum_step"] == bare["sequences_per_update"] == 256
    assert bare["train_batch_size"] == "auto"


@pytest.mark.parametrize("command", [TPU, XLA_ON_CUDA], ids=["TPU", "XLA on CUDA"])
def test_xla_devices_that_are_not_here_are_named_and_the_rest_trains(command: str, places: dict[str, Any]) -> None:
    """With the options of the XLA runner, in the torch runtime."""
    environment = dict(word.split("=") for word in split(command) if word.split("=")[0].isupper() and "=" in word)
    with pytest.raises(InputError, match=f"PJRT_DEVICE={environment['PJRT_DEVICE']}"):
        xla_environment.prepare(environment)
    config, options = parse_run(XlaConfig, words_of(command, SIZES | places))
    assert options == XlaConfig(use_syncfree_optim=command == TPU, mp_start_method="spawn")
    pretrain(config, lambda train: TorchRuntime(TorchConfig(), train))
    assert len(training_losses(places["--checkpoints-dir"])) == 3


@pytest.mark.slow
def test_two_processes(places: dict[str, Any]) -> None:
    assert shlex.split(TWO_GPUS)[1:] == ["--standalone", "--nproc_per_node=2", "run_pretrain.py"]
    succeed(torchrun(2, *words_of(TWO_GPUS, SIZES | places)))
    assert len(training_losses(places["--checkpoints-dir"])) == 3


@pytest.mark.slow
def test_tpu_command_on_xla_cpu(places: dict[str, Any]) -> None:
    succeed(run_xla(*words_of(TPU, SIZES | places)))
    assert len(training_losses(places["--checkpoints-dir"])) == 3


def test_generate(tmp_path: Path, gpt2_encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint in the layout and with the names of the repository that published the command."""
    torch.manual_seed(0)
    d, vocab, length = 16, 50304, 64
    state = {
        "token_embedding.weight": (vocab, d),
        "positional_embedding.weight": (length, d),
        "layer_norm.weight": (d,),
    }
    block = {
        "layer_norm_1.weight": (d,), "layer_norm_1.bias": (d,), "layer_norm_2.weight": (d,), "layer_norm_2.bias": (d,),
        "causal_self_attention.w_qkv.weight": (3 * d, d), "causal_self_attention.w_qkv.bias": (3 * d,),
        "causal_self_attention.rl_projection.weight": (d, d), "causal_self_attention.rl_projection.bias": (d,),
        "position_wise_ffn.linear.weight": (4 * d, d), "position_wise_ffn.linear.bias": (4 * d,),
        "position_wise_ffn.rl_projection.weight": (d, 4 * d), "position_wise_ffn.rl_projection.bias": (d,),
    }  # fmt: skip
    state |= {"layer_norm.bias": (d,)} | {f"decoder_blocks.0.{name}": shape for name, shape in block.items()}
    config = {
        "vocab_size": vocab, "seq_length": length, "d_model": d, "num_layers": 1, "num_heads": 2, "d_ff": 4 * d,
        "dropout": 0.0, "activation": "gelu", "tie_weights": True, "eps": 1e-6,
    }  # fmt: skip
    weights = {name: torch.randn(shape) * 0.1 for name, shape in state.items()}
    file = tmp_path / "gpt2-20000.pt"
    torch.save({"model": weights, "optimizer": {}, "lr_scheduler": {}, "config": config, "global_step": 20000}, file)
    said = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("I'm a large language model,\n"))
        said.append(succeed(run_here("generate.py", *words_of(GENERATE, {"--model": file, "--max-new-tokens": 8}))))
    assert said[0].startswith(">> I'm a large language model,")
    assert said[0] == said[1]


@pytest.fixture
def published_model(tmp_path: Path) -> Path:
    """A folder gpt2 as OpenAI's is stored: an odd number of ids, without padding, and the tanh form of GELU."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=497, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


BASELINE_SIZES = {name: size for name, size in SIZES.items() if name in split(BASELINE)}


def reference_loss(model: Path, tokens: np.ndarray) -> float:
    """By transformers, in float64."""
    theirs = GPT2LMHeadModel.from_pretrained(model).double().eval()
    windows = torch.tensor(np.stack([tokens[i : i + 17] for i in range(0, len(tokens) - 16, 16)]).astype(np.int64))
    with torch.no_grad():
        logits = theirs(windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def test_baseline(published_model: Path, places: dict[str, Any]) -> None:
    """--activation gelu is what OpenAI's checkpoints have; fp16 only rounds."""
    changes = BASELINE_SIZES | places | {"--from-checkpoint": published_model, "--valid-steps": 500}
    config, options = parse_run(XlaConfig, words_of(BASELINE, changes))
    assert options == XlaConfig(mp_start_method="spawn")
    pretrain(config, lambda train: TorchRuntime(TorchConfig(), train))
    (line,) = [json.loads(text) for text in (places["--checkpoints-dir"] / "test.jsonl").read_text().splitlines()]
    tokens = np.load(places["--valid-dir"] / "fineweb_0000.npy")
    assert line["valid_tokens"] == len(tokens) - 1
    assert line["valid_loss"] == pytest.approx(reference_loss(published_model, tokens), rel=1e-3)


@pytest.mark.slow
def test_baseline_on_xla_cpu(published_model: Path, places: dict[str, Any]) -> None:
    changes = BASELINE_SIZES | places | {"--from-checkpoint": published_model, "--valid-steps": 500}
    succeed(run_xla(*words_of(BASELINE, changes)))


def build_nanogpt(folder: Path, train: np.ndarray, valid: np.ndarray) -> None:
    for number, part in enumerate(np.split(train, 2), start=1):
        np.save(folder / f"edufineweb_train_{number:06d}.npy", part)
    np.save(folder / "edufineweb_val_000000.npy", valid)


def nanogpt(folder: Path, train: np.ndarray, valid: np.ndarray) -> None:
    train.tofile(folder / "train.bin")
    valid.tofile(folder / "val.bin")


@pytest.mark.parametrize("write", [build_nanogpt, nanogpt])
def test_shards_of_other_repositories(write: Any, places: dict[str, Any], tmp_path: Path) -> None:
    """Both splits in one folder, as their programs read it: the same losses as from our own folders."""
    train, valid = (np.load(places[flag] / "fineweb_0000.npy") for flag in ("--train-dir", "--valid-dir"))
    (tmp_path / "theirs").mkdir()
    write(tmp_path / "theirs", train, valid)
    for flag, tokens in (("--train-dir", train), ("--valid-dir", valid)):
        stream = TokenStream(tmp_path / "theirs", flag)
        assert np.array_equal(stream.read(0, stream.length), tokens)
    for folders in (places, dict.fromkeys(("--train-dir", "--valid-dir"), tmp_path / "theirs")):
        changes = SIZES | folders | {"--checkpoints-dir": tmp_path / f"c{len(folders)}"}
        succeed(run_here("run_pretrain.py", *words_of(TWO_GPUS, changes)))
    lines = [[(line.get("loss"), line.get("valid_loss")) for line in metrics(tmp_path / name)] for name in ("c3", "c2")]
    assert lines[0] == lines[1]
