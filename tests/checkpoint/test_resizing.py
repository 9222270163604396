"""--resize-vocab: new ids get rows, which are the mean of the old ones and are predicted; wrong tokenizers are refused."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import metrics, run_here, run_xla, succeed, training_losses
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt2xla.checkpoint.loading import load_weights
from gpt2xla.checkpoint.start import Start, find_start
from gpt2xla.cli import parse_run
from gpt2xla.config import TorchConfig
from gpt2xla.data.documents.corpus import local_parts
from gpt2xla.data.preparation.pipeline import PrepareConfig, prepare
from gpt2xla.data.tokenizer import Tokenizer, load_tokenizer
from gpt2xla.errors import InputError

OLD, NEW = 257, 260  # ids of bytes with end of text, and with the roles
ROLES = ["<|user|>", "<|assistant|>", "<|end|>"]
INSTRUCT = ["--config", "configs/instruct.yaml"]
SMALL = ["--eval-batch-size", "8", "--valid-steps", "4", "--epochs", "1"]


def with_tokens(folder: Path, tokens: Sequence[str]) -> Tokenizer:
    backend = load_tokenizer("bytes").backend
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    roles = {"eos_token": "<|endoftext|>"}
    folder.mkdir()
    Tokenizer(folder.name, backend, roles).save(folder)
    return load_tokenizer(str(folder))


def data_of(folder: Path, tokenizer: Tokenizer) -> Path:
    (folder / "texts.txt").write_text("\n".join(f"<|user|>{i}<|end|><|assistant|>{i + 1}<|end|>" for i in range(120)))
    config = PrepareConfig(output_dir=str(folder / "data"), seed=0, test_fraction=0.2, special_tokens_in_text="as-ids")
    prepare(local_parts([folder / "texts.txt"], split_by="line"), tokenizer, config)
    return folder / "data"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Someone's model of bytes, with its tokenizer."""
    folder = tmp_path_factory.mktemp("theirs") / "model"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=OLD, n_positions=16, n_embd=32, n_layer=1, n_head=2, tie_word_embeddings=request.param,
        bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    load_tokenizer("bytes").save(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    return data_of(folder, with_tokens(folder / "roles", ROLES))


def begin(source: Path, data: Path, *flags: object) -> Start:
    words = ["--from-checkpoint", source, "--train-dir", data / "train", "--valid-dir", data / "test"]
    config = parse_run(TorchConfig, [*map(str, words), "--checkpoints-dir", str(source / "none"), *map(str, flags)])[0]
    return find_start(config)


@torch.no_grad()
def test_new_rows_are_the_mean_that_transformers_takes(theirs: Path, chats: Path) -> None:
    """transformers adds noise of 1e-9 of the rows' covariance, a standard deviation of about 3e-6 here."""
    start = begin(theirs, chats, "--resize-vocab")
    assert start.notes == (
        "vocabulary: 257 ids and 3 new ones, whose rows begin as the mean of the others; padded to 384",
    )
    model = start.build_model().eval()
    expected = AutoModelForCausalLM.from_pretrained(theirs).eval()
    before = expected.get_input_embeddings().weight.double().mean(0), expected.lm_head.weight.double().mean(0)
    ids = torch.randint(0, OLD, (2, 16), generator=torch.Generator().manual_seed(1))
    old_logits = expected(ids).logits
    expected.resize_token_embeddings(NEW, mean_resizing=True)
    pairs = ((model.wte.weight, expected.get_input_embeddings()), (model.head_weight, expected.lm_head))
    for ours, other, mean in zip(*zip(*pairs, strict=True), before, strict=True):
        assert ours.shape == (384, 32)
        assert torch.equal(ours[:OLD], other.weight[:OLD])
        torch.testing.assert_close(ours[OLD:NEW], other.weight[OLD:NEW], rtol=0, atol=3e-5)
        torch.testing.assert_close(ours[OLD:NEW].double(), mean.expand(3, -1), rtol=1e-6, atol=1e-7)
        assert not ours[NEW:].any()
    logits = model.logits(ids)
    torch.testing.assert_close(logits[..., :OLD], old_logits, rtol=0, atol=1e-5)
    assert logits[..., OLD:NEW].isfinite().all(), "they are predicted"
    assert (logits[..., NEW:] == -torch.inf).all()


@pytest.fixture(scope="module")
def tuned(theirs: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of configs/instruct.yaml."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    flags = ["--from-checkpoint", theirs, "--train-dir", chats, "--checkpoints-dir", folder]
    shown = succeed(run_here("run_pretrain.py", *INSTRUCT, *SMALL, *flags))
    assert "3 new ones" in shown
    return folder


def test_what_is_saved_is_a_model_of_the_new_tokenizer(tuned: Path, chats: Path) -> None:
    last = max(tuned.glob("step-*"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(last), AutoTokenizer.from_pretrained(last)
    assert model.get_input_embeddings().weight.shape == (NEW, 32)
    assert (len(tokenizer), tokenizer.convert_tokens_to_ids(ROLES)) == (NEW, [257, 258, 259])
    assert load_tokenizer(str(last)).sha256 == load_tokenizer(str(chats / "train")).sha256
    config, _ = load_weights(last)
    assert (config.vocab_size, config.real_vocab_size) == (384, NEW)
    rows = model.get_input_embeddings().weight
    assert (rows[OLD:] - rows[OLD:].mean(0)).norm(dim=1).min() > 0, "they have been trained apart"


def test_the_same_command_resumes_with_and_without_the_flag(tuned: Path, theirs: Path, chats: Path) -> None:
    flags = ["--from-checkpoint", theirs, "--train-dir", chats, "--checkpoints-dir", tuned]
    assert "nothing to do" in succeed(run_here("run_pretrain.py", *INSTRUCT, *SMALL, *flags))
    steps = metrics(tuned)[-1]["step"]
    shown = succeed(run_here("run_pretrain.py", *INSTRUCT, *SMALL[:4], *flags, "--train-steps", steps + 1))
    assert f"after step {steps}" in shown
    assert f"after step {steps + 1}" in succeed(
        run_here("run_pretrain.py", "--checkpoints-dir", tuned, "--train-steps", steps + 2)
    )


def test_our_own_checkpoint_begins_a_new_run(tuned: Path, tmp_path: Path) -> None:
    """The flag makes the difference: otherwise our own checkpoint is resumed."""
    data = data_of(tmp_path, with_tokens(tmp_path / "more", [*ROLES, "<|tool|>"]))
    start = begin(max(tuned.glob("step-*")), data, "--resize-vocab")
    assert (start.step, start.training) == (0, None)
    assert (start.config.model.vocab_size, start.config.model.real_vocab_size) == (384, 261)


def test_conversations_are_mixed_with_text_of_the_tokenizer_that_theirs_extends(
    theirs: Path, chats: Path, tmp_path: Path
) -> None:
    text = data_of(tmp_path, load_tokenizer("bytes"))
    for number, (first, second) in enumerate([(text, chats), (chats, text)]):
        shown = succeed(
            run_here(
                "run_pretrain.py", *INSTRUCT, *SMALL, "--from-checkpoint", theirs, "--train-dir", f"{first / 'train'}=0.5",
                f"{second / 'train'}=0.5", "--valid-dir", text / "test", "--checkpoints-dir", tmp_path / f"run-{number}",
            )
        )  # fmt: skip
        assert "3 new ones" in shown


def test_with_nothing_to_add_it_says_so_and_changes_nothing(theirs: Path, tmp_path: Path) -> None:
    data = data_of(tmp_path, load_tokenizer("bytes"))
    start = begin(theirs, data, "--resize-vocab")
    assert "nothing to do for --resize-vocab" in start.notes[0]
    assert (start.config.model.vocab_size, start.config.model.vocab_padding) == (OLD, 0)
    weights = load_file(theirs / "model.safetensors")
    assert torch.equal(start.build_model().wte.weight, weights["transformer.wte.weight"])


def test_rows_without_a_token_are_no_part_of_the_mean_and_get_it(theirs: Path, chats: Path, tmp_path: Path) -> None:
    """A model trained here from scratch has rows behind its tokenizer's ids, which text never used."""
    model = AutoModelForCausalLM.from_pretrained(theirs)
    model.resize_token_embeddings(384, mean_resizing=False)
    model.get_input_embeddings().weight.data[OLD:] = 100.0
    model.save_pretrained(tmp_path)
    load_tokenizer("bytes").save(tmp_path)
    flags = ["--from-checkpoint", tmp_path, "--train-dir", chats, "--checkpoints-dir", tmp_path / "run"]
    refused = run_here("run_pretrain.py", *flags)
    assert refused.returncode == 2
    assert "if theirs only adds tokens, train with --resize-vocab" in refused.stderr
    start = begin(tmp_path, chats, "--resize-vocab", "--vocab-size", 320)
    rows = start.build_model().wte.weight
    torch.testing.assert_close(rows[OLD:NEW], rows[:OLD].mean(0).expand(3, -1))
    assert (rows.shape, start.config.model.real_vocab_size) == ((320, 32), NEW)


def test_what_cannot_be_is_refused(theirs: Path, chats: Path, tmp_path: Path) -> None:
    other = with_tokens(tmp_path / "other", [])
    definition = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocab = definition["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).symlink_to(theirs / name)
    assert other.vocab_size == OLD
    for source, flags, message in (
        (theirs, [], r"made with a tokenizer of 260 ids, but .* has 257; give the new ones rows with --resize-vocab"),
        (
            theirs,
            ["--resize-vocab", "--tokenizer", tmp_path / "other"],
            "--resize-vocab: id 65 is 'A' in .* but is 'B'",
        ),
        (tmp_path / "bare", ["--resize-vocab"], "--resize-vocab: .* has no tokenizer"),
        (
            theirs,
            ["--resize-vocab", "--vocab-size", 258],
            "--vocab-size 258 is less than the 260 ids .* --resize-vocab",
        ),
        (theirs, ["--resize-vocab", "--do-test"], "--do-test trains none"),
    ):
        with pytest.raises(InputError, match=message):
            begin(source, chats, *flags)
    plain = tmp_path / "plain"
    for split in ("train", "test"):
        (plain / split).mkdir(parents=True)
        for file in (chats / split).glob("*.npy"):
            (plain / split / file.name).symlink_to(file)
    with pytest.raises(InputError, match="--resize-vocab: there is no tokenizer beside --train-dir"):
        begin(theirs, plain, "--resize-vocab")
    with pytest.raises(InputError, match="--resize-vocab needs a model to start from"):
        find_start(parse_run(TorchConfig, ["--resize-vocab", "--checkpoints-dir", str(tmp_path / "none")])[0])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["", "--spmd --fsdp"])
def test_a_run_on_xla_equals_torch(layout: str, theirs: Path, chats: Path, tmp_path: Path) -> None:
    flags = [*INSTRUCT, *SMALL, "--from-checkpoint", theirs, "--train-dir", chats, "--train-batch-size", 16]
    succeed(run_here("run_pretrain.py", *flags, "--checkpoints-dir", tmp_path / "torch"))
    devices = {"CPU_NUM_DEVICES": "4"} if layout else {}
    result = run_xla(*flags, *layout.split(), "--checkpoints-dir", tmp_path / "xla", **devices)
    succeed(result)
    assert training_losses(tmp_path / "xla") == pytest.approx(training_losses(tmp_path / "torch"), rel=1e-5)
    assert [line["compiles"] for line in metrics(tmp_path / "xla") if "compiles" in line][-1] <= 2
