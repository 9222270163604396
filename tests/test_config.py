"""Flags, files and presets: which value wins, and that nothing is lost on the way."""

import json
from pathlib import Path

import pytest

from gpt2xla.cli import parse_run
from gpt2xla.config import DataConfig, TorchConfig, XlaConfig
from gpt2xla.errors import InputError

PROMISED = """--checkpoints-dir --seed --train-dir --valid-dir --drop-last --vocab-size --seq-length --d-model --num-layers
--num-heads --d-ff --dropout --activation --tie-weights --wandb-logging --wandb-project --wandb-name --wandb-logging-interval
--wandb-resume-id --wandb-notes --wandb-tags --do-test --compile --matmul-precision --optim-type --learning-rate --betas
--weight-decay --decay-method --warmup-steps --min-lr --decay-steps --train-batch-size --eval-batch-size
--gradient-accum-step --mixed-precision --train-steps --valid-steps --valid-interval --save-interval
--saved-checkpoint-limit --max-grad-norm --from-checkpoint --config --preset --resume --max-hours""".split()

PUBLISHED_RECIPE = """--checkpoints-dir ./checkpoints --seed 1061109567 --train-dir ./fineweb_10BT/train
--valid-dir ./fineweb_10BT/test --vocab-size 50304 --seq-length 1024 --d-model 768 --num-layers 12 --num-heads 12
--d-ff 3072 --activation gelu --tie-weights --wandb-logging --wandb-project pre-training-gpt2 --wandb-name gpt2-124m
--wandb-logging-interval 100 --optim-type adamw --learning-rate 0.0006 --betas 0.9 0.95 --weight-decay 0.1
--decay-method cosine --warmup-steps 750 --min-lr 0.00006 --decay-steps 20000 --train-batch-size 256
--eval-batch-size 256 --gradient-accum-step 1 --mixed-precision bf16 --train-steps 20000 --valid-steps 100
--valid-interval 500 --save-interval 1000 --saved-checkpoint-limit 6 --max-grad-norm 1.0""".split()


@pytest.mark.parametrize(
    ("group", "own"),
    [
        (TorchConfig, ["--ddp-backend", "--zero1", "--fsdp"]),
        (XlaConfig, ["--mp-start-method", "--ddp", "--use-syncfree-optim"]),
    ],
)
def test_help_lists_every_promised_flag_and_its_default(
    group: type, own: list[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_run(group, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert [flag for flag in PROMISED + own if f"{flag} " not in text and f"{flag}," not in text] == []
    assert "(default: 0.9 0.95)" in text
    assert "(default: on)" in text


def test_the_published_recipe_parses_as_written() -> None:
    config, _ = parse_run(TorchConfig, PUBLISHED_RECIPE)
    assert (config.model.d_model, config.model.tie_weights, config.model.activation) == (768, True, "gelu-tanh")
    assert config.optim.betas == (0.9, 0.95)
    assert config.train.mixed_precision == "bf16"
    assert config.wandb.wandb_name == "gpt2-124m"


def test_flag_beats_file_beats_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "preset: gpt2-medium\nnum-layers: 6\nseq_length: 256\nlearning_rate: 1e-3\nshuffle: true\nbetas: [0.8, 0.9]\n"
    )
    config, _ = parse_run(TorchConfig, ["--config", str(file), "--seq-length", "128", "--no-shuffle"])
    assert config.model.d_model == 1024, "from the preset"
    assert config.model.num_layers == 6, "from the file"
    assert config.model.seq_length == 128, "from the flag"
    assert config.optim.learning_rate == 1e-3, "YAML 1.1 reads 1e-3 as text"
    assert config.optim.betas == (0.8, 0.9)
    assert not config.data.shuffle
    assert {"d_model", "num_layers", "seq_length", "shuffle"} <= config.given
    assert "dropout" not in config.given


def test_a_preset_on_the_command_line_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("d_model: 64\n")
    config, _ = parse_run(TorchConfig, ["--config", str(file), "--preset", "gpt2-xl"])
    assert (config.model.d_model, config.model.num_heads, config.model.d_ff) == (1600, 25, 6400)


def test_a_run_written_as_json_reads_back_the_same(tmp_path: Path) -> None:
    config, _ = parse_run(TorchConfig, [*PUBLISHED_RECIPE, "--max-hours", "8.5", "--wandb-tags", "a,b", "--no-bias"])
    file = tmp_path / "run_config.json"
    file.write_text(json.dumps(config.to_flat()))
    again, _ = parse_run(TorchConfig, ["--config", str(file)])
    assert again.to_flat() == config.to_flat() | {"data_cache": str(Path("~/.cache/gpt2xla/data").expanduser())}


def test_valid_steps_is_a_number_or_all(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for text, value in (("7", 7), ("all", "all")):
        config, _ = parse_run(TorchConfig, ["--valid-steps", text])
        assert config.train.valid_steps == value
        for written in (f"valid_steps: {text}\n", json.dumps(config.to_flat())):
            file.write_text(written)
            assert parse_run(TorchConfig, ["--config", str(file)])[0].train.valid_steps == value
    for text in ("some", "0", "-3", "1.5"):
        with pytest.raises(InputError, match=f"--valid-steps.*{text}"):
            parse_run(TorchConfig, ["--valid-steps", text])


def test_d_ff_follows_d_model() -> None:
    config, _ = parse_run(TorchConfig, ["--d-model", "96"])
    assert config.model.d_ff == 384


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("d_model: wide\n", "d_model: 'wide'"),
        ("no_such_option: 1\n", "no_such_option is unknown"),
        ("- 1\n", "holds no options"),
        ("a: [\n", "is not YAML"),
        ("x: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("config: other.yaml\n", "cannot name another"),
        ("resume:\n  never: 1\n", "resume has keys below it"),
    ],
)
def test_a_wrong_config_file_is_named_with_its_culprit(tmp_path: Path, text: str, culprit: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        parse_run(TorchConfig, ["--config", str(file)])
    assert str(file) in str(error.value)
    assert culprit in str(error.value)
    assert "\n" not in str(error.value)


def test_one_train_dir_or_several_by_flag_and_by_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for text, folders in (("train_dir: a", ("a",)), ("train_dir: [a=0.7, b=0.3]", ("a=0.7", "b=0.3"))):
        file.write_text(text + "\n")
        assert parse_run(TorchConfig, ["--config", str(file)])[0].data.train_dir == folders
        flags = ["--train-dir", *folders]
        assert parse_run(TorchConfig, flags)[0].data.train_dir == folders
    assert DataConfig(train_dir="a").train_dir == ("a",)
    with pytest.raises(InputError, match="--train-dir is empty"):
        parse_run(TorchConfig, ["--train-dir", ""])
    with pytest.raises(InputError, match="--data-cache-gb -1"):
        parse_run(TorchConfig, ["--data-cache-gb", "-1"])
