"""A run starts from someone's weights: with a padded vocabulary, with fewer positions, or is refused."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, metrics, run, run_here, run_xla, succeed, training_losses
from hf_state import from_hf_state
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.checkpoint.loading import build_model, load_weights
from gpt2xla.checkpoint.start import Start, find_start
from gpt2xla.cli import parse_run
from gpt2xla.config import RECIPES, ModelConfig, OptimConfig, RunConfig, TorchConfig
from gpt2xla.errors import InputError
from gpt2xla.generation.decoding import generate
from gpt2xla.generation.sampling import SamplingConfig
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2
from gpt2xla.model.kernels import Kernels
from gpt2xla.model.loss import chunked_cross_entropy
from gpt2xla.optim.schedule import learning_rate

PADDED = [
    "--vocab-size", "128", "--seq-length", "16", "--dropout", "0", "--train-batch-size", "4", "--gradient-accum-step", "3",
    "--eval-batch-size", "4", "--valid-steps", "3", "--learning-rate", "0.01", "--min-lr", "0.001", "--warmup-steps", "4",
    "--decay-steps", "20", "--max-grad-norm", "0.5", "--train-steps", "20", "--valid-interval", "10",
    "--save-interval", "10",
]  # fmt: skip
KERNELS = {"plain": Kernels()} | {
    f"{chunks} pieces": Kernels(cross_entropy=partial(chunked_cross_entropy, chunks=chunks)) for chunks in (1, 3)
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Someone's model: 97 ids and 24 positions, with weights large enough for sharp predictions."""
    return strangers_model(tmp_path_factory.mktemp("theirs"), request.param)


def strangers_model(folder: Path, tied: bool) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_positions=24, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=tied, bos_token_id=96,
        eos_token_id=96,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder)
    return folder


def options(*flags: object) -> RunConfig:
    return parse_run(TorchConfig, [*map(str, flags)])[0]


def start(folder: Path, *flags: object) -> Start:
    return find_start(options("--from-checkpoint", folder, "--checkpoints-dir", folder / "none", *flags))


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 97, (3, 17), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
def test_a_padded_and_cut_model_is_the_same_function(folder: Path, kernels: Kernels) -> None:
    """Loss and gradients are those of Hugging Face's unpadded model in float64; padding's gradient is exactly 0."""
    begun = start(folder, "--vocab-size", 128, "--seq-length", 16)
    assert begun.notes == (
        "vocabulary: 97 ids and 31 of padding, which are never predicted",
        "positions: the first 16 of 24",
    )
    model = begun.build_model().eval()
    model.kernels = kernels
    assert (model.wte.weight.shape, model.wpe.weight.shape) == ((128, 32), (16, 32))
    ids, labels = batch()
    loss, count = model(ids, labels)
    (loss / count).backward()

    theirs = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    logits = theirs(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    torch.testing.assert_close((loss / count).double(), expected, rtol=1e-6, atol=0)
    gradients = from_hf_state(model.config, {name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        rows = min(len(parameter), len(gradients[name]))
        error = (parameter.grad[:rows] - gradients[name][:rows]).norm() / gradients[name].norm()
        assert error <= 1e-5, name
        assert not parameter.grad[rows:].any(), name
    ours = model.logits(ids)
    torch.testing.assert_close(ours[..., :97].double(), logits, rtol=0, atol=1e-4)
    assert (ours[..., 97:] == -torch.inf).all()


def test_padding_is_never_drawn_and_carries_no_probability_where_zero_would_win(folder: Path) -> None:
    """Every real logit is far below the 0 that an unmasked row of zeros would give."""
    model = start(folder, "--vocab-size", 128).build_model().eval()
    with torch.no_grad():
        head = model.head_weight
        head[:97] = -head[:97].abs()
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(10.0)
    ids, labels = batch()
    for kernels in KERNELS.values():
        model.kernels = kernels
        loss, _ = model(ids, labels)
        real = model.logits(ids)[..., :97].double().flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(real, labels.flatten(), reduction="sum")
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    steps = list(generate(model, [[1]], 200, SamplingConfig(temperature=100.0)))
    assert max(token for (token,) in steps) < 97
    assert next(generate(model, [[1]], 1))[0] < 97


def test_what_is_saved_is_cut_back_and_padded_again(folder: Path, tmp_path: Path) -> None:
    model = start(folder, "--vocab-size", 128, "--seq-length", 16).build_model().eval()
    hf.save_model(tmp_path, model.config, model.state_dict(), GenerationSettings.ending_with(96))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.get_input_embeddings().weight.shape == (97, 32)
    ids, _ = batch()
    torch.testing.assert_close(theirs(ids).logits, model.logits(ids)[..., :97], rtol=0, atol=1e-5)
    assert theirs.generate(ids[:1, :5], do_sample=True, temperature=100.0, max_new_tokens=10).max() < 97
    theirs.save_pretrained(tmp_path / "again")
    for saved in (tmp_path, tmp_path / "again"):
        config, weights = load_weights(saved)
        assert config == model.config
        again = build_model(config, weights, saved)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_vocabulary_that_hugging_face_grew_stays_aligned_or_unpadded(folder: Path, tmp_path: Path) -> None:
    model = start(folder, "--vocab-size", 128).build_model()
    hf.save_model(tmp_path, model.config, model.state_dict(), GenerationSettings.ending_with(96))
    for size, padding in ((100, 28), (150, 0)):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        theirs.resize_token_embeddings(size)
        theirs.save_pretrained(tmp_path / str(size))
        config, _ = load_weights(tmp_path / str(size))
        assert (config.vocab_size - config.vocab_padding, config.vocab_padding) == (size, padding)


def test_impossible_sizes_are_refused_with_the_fix(folder: Path) -> None:
    for flags, message in {
        ("--vocab-size", 96): r"--vocab-size 96 is less than the 97 ids of .*; use 97, or 128 for aligned shapes",
        ("--seq-length", 25): r"--seq-length 25 is more than the 24 positions that .* has; use at most 24",
        ("--seq-length", 0): r"--seq-length 0",
        ("--d-model", 64): r"--d-model 64 contradicts .* where it is 32",
        ("--num-layers", 3): r"--num-layers 3 contradicts .* where it is 2",
    }.items():
        with pytest.raises(InputError, match=message):
            start(folder, *flags)


def test_a_resumed_run_is_not_resized_but_its_weights_may_be(trained: Path, tmp_path: Path) -> None:
    source = trained / "step-00000020"
    for flags in (("--vocab-size", "128"), ("--seq-length", "8")):
        asked = ["--from-checkpoint", source, "--checkpoints-dir", tmp_path / "new", *flags]
        with pytest.raises(InputError, match=r"contradicts .*begin a new run with its weights \(--resume never\)"):
            find_start(options(*asked))
        with pytest.raises(InputError, match=r"contradicts .*--resume never"):
            find_start(options("--checkpoints-dir", trained, *flags))
        model = find_start(options(*asked, "--resume", "never")).config.model
        assert (model.vocab_size, model.real_vocab_size, model.seq_length) in ((128, 97, 16), (97, 97, 8))


def test_a_resumed_run_keeps_its_recipe(data_flags: list[str], tmp_path: Path) -> None:
    sizes = SMALL_RUN[: SMALL_RUN.index("--learning-rate")]
    flags = [*data_flags, *sizes, "--checkpoints-dir", tmp_path]
    succeed(run_here("run_pretrain.py", *flags, "--recipe", "fast", "--train-steps", 1))
    for words in ([], ["--recipe", "fast"]):
        optim = find_start(options(*flags, "--train-steps", 2, *words)).config.optim
        assert {name: getattr(optim, name) for name in RECIPES["fast"]} == RECIPES["fast"]
    with pytest.raises(InputError, match="--optim-type adamw"):
        find_start(options(*flags, "--train-steps", 2, "--recipe", "gpt2"))


def test_a_run_from_new_weights_has_no_padding(trained: Path) -> None:
    config = json.loads((trained / "step-00000020" / "config.json").read_text())
    assert config["vocab_size"] == 97
    assert "gpt2xla_vocab_size" not in config


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strangers_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def padded_run(theirs: Path, data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padded")
    flags = [*data_flags, *PADDED, "--from-checkpoint", theirs, "--checkpoints-dir", folder]
    succeed(run_here("run_pretrain.py", *flags))
    return folder


def test_fine_tuning_padded_equals_hugging_face_and_adamw_in_float64(
    theirs: Path, padded_run: Path, data: Path
) -> None:
    """The truth is the unpadded model, with torch's AdamW and windows cut by hand."""
    tokens = np.concatenate([np.load(file) for file in sorted((data / "train").glob("*.npy"))]).astype(np.int64)
    model = AutoModelForCausalLM.from_pretrained(theirs).double().eval()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = OptimConfig(learning_rate=0.01, min_lr=0.001, warmup_steps=4, decay_steps=20)
    expected = []
    for step in range(20):
        windows = torch.from_numpy(np.stack([tokens[16 * w : 16 * w + 17] for w in range(12 * step, 12 * step + 12)]))
        logits = model(windows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, 32, step)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert training_losses(padded_run) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] - 0.5


def test_a_padded_run_resumes_bit_for_bit(
    theirs: Path, padded_run: Path, data_flags: list[str], tmp_path: Path
) -> None:
    flags = [*data_flags, *PADDED, "--from-checkpoint", theirs, "--checkpoints-dir", tmp_path]
    succeed(run_here("run_pretrain.py", *flags, "--train-steps", 10))
    moments = torch.load(tmp_path / "step-00000010" / "training_state.pt", weights_only=True)["optimizer"]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert moments[moment]["wte.weight"].shape == (128, 32)
        assert not moments[moment]["wte.weight"][97:].any()
    assert "after step 10" in succeed(run("run_pretrain.py", "--checkpoints-dir", tmp_path, "--train-steps", 20))
    assert training_losses(tmp_path) == training_losses(padded_run)
    ends = [folder / "step-00000020" for folder in (tmp_path, padded_run)]
    ours, unbroken = (load_file(end / "model.safetensors") for end in ends)
    assert all(torch.equal(ours[name], unbroken[name]) for name in unbroken)
    states = [torch.load(end / "training_state.pt", weights_only=True)["optimizer"] for end in ends]
    assert all(
        torch.equal(states[0][m][name], t) for m in ("exp_avg", "exp_avg_sq") for name, t in states[1][m].items()
    )
    assert ours["transformer.wte.weight"].shape == (97, 32)


@pytest.mark.slow
def test_a_padded_run_on_xla_equals_torch_in_two_graphs(
    theirs: Path, padded_run: Path, data_flags: list[str], tmp_path: Path
) -> None:
    flags = [*data_flags, *PADDED, "--from-checkpoint", theirs, "--checkpoints-dir", tmp_path]
    result = run_xla(*flags)
    succeed(result)
    assert "warning: XLA" not in result.stderr
    assert training_losses(tmp_path) == pytest.approx(training_losses(padded_run), rel=1e-5)
    both = [[line["valid_loss"] for line in metrics(f) if "valid_loss" in line] for f in (tmp_path, padded_run)]
    assert both[0] == pytest.approx(both[1], rel=1e-5)
    assert [line["compiles"] for line in metrics(tmp_path) if "loss" in line][-1] == 2


@pytest.mark.slow
def test_a_padded_run_under_fsdp_equals_torch_and_resumes(
    theirs: Path, padded_run: Path, data_flags: list[str], tmp_path: Path
) -> None:
    flags = [*data_flags, *PADDED, "--from-checkpoint", theirs, "--checkpoints-dir", tmp_path, "--spmd", "--fsdp"]
    succeed(run_xla(*flags, "--train-steps", 10, CPU_NUM_DEVICES="4"))
    succeed(run_xla(*flags, CPU_NUM_DEVICES="4"))
    assert training_losses(tmp_path) == pytest.approx(training_losses(padded_run), rel=1e-5)
    assert load_file(tmp_path / "step-00000020" / "model.safetensors")["transformer.wte.weight"].shape == (97, 32)


def test_padding_is_not_an_option() -> None:
    config = RunConfig(model=dataclasses.replace(ModelConfig(), vocab_padding=47))
    assert "vocab_padding" not in config.to_flat()
    with pytest.raises(InputError, match="--vocab-padding"):
        options("--vocab-padding", "47")


def test_a_run_saved_by_its_options_starts_alike(theirs: Path, tmp_path: Path) -> None:
    flags = ["--from-checkpoint", theirs, "--checkpoints-dir", tmp_path]
    first = find_start(options(*flags, "--vocab-size", 128)).config
    (tmp_path / "run.json").write_text(json.dumps(first.to_flat()))
    again = find_start(options("--config", tmp_path / "run.json")).config
    assert again.model == first.model
    assert GPT2(again.model).wte.weight.shape == (128, 32)
