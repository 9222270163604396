"""Flags, files and presets: which value wins, and that nothing is lost on the way."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, run_here

from gpt2xla.cli import parse_run
from gpt2xla.config import RECIPES, DataConfig, OptimConfig, RunConfig, TorchConfig, XlaConfig
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


def test_the_recipe_gpt2_is_what_a_run_has_by_default() -> None:
    plain, _ = parse_run(TorchConfig, [])
    config, _ = parse_run(TorchConfig, ["--recipe", "gpt2"])
    assert config.to_flat() == plain.to_flat()
    assert {"optim_type", "learning_rate"} <= config.given


def test_flag_beats_recipe_and_the_command_lines_recipe_beats_the_file(tmp_path: Path) -> None:
    config, _ = parse_run(TorchConfig, ["--recipe", "fast", "--preset", "gpt2", "--weight-decay", "0.05"])
    assert (config.optim.optim_type, config.optim.weight_decay, config.model.d_model) == ("muon", 0.05, 768)
    assert config.optim.learning_rate > OptimConfig.learning_rate
    assert config.optim.learning_rate == pytest.approx(10 * config.optim.min_lr)
    file = tmp_path / "run.yaml"
    file.write_text("recipe: fast\nlearning_rate: 0.01\n")
    config, _ = parse_run(TorchConfig, ["--config", str(file)])
    assert (config.optim.optim_type, config.optim.learning_rate) == ("muon", 0.01)
    config, _ = parse_run(TorchConfig, ["--config", str(file), "--recipe", "gpt2"])
    assert (config.optim.optim_type, config.optim.learning_rate) == ("adamw", 6e-4)
    with pytest.raises(InputError, match="--recipe 'slow': choose gpt2, fast or instruct"):
        parse_run(TorchConfig, ["--recipe", "slow"])


def test_the_instruct_config_is_the_recipe_and_what_a_run_needs_beside_it() -> None:
    config, _ = parse_run(TorchConfig, ["--config", str(ROOT / "configs" / "instruct.yaml")])
    assert {name: config.to_flat()[name] for name in RECIPES["instruct"]} == RECIPES["instruct"] | {"warmup_steps": 600}
    train = config.train
    assert (train.epochs, train.sequences, train.neftune_alpha) == (5, 32, 5)
    assert (train.early_stopping_patience, train.keeps_best) == (3, True)
    shorter, _ = parse_run(TorchConfig, ["--config", str(ROOT / "configs" / "instruct.yaml"), "--train-steps", "40"])
    assert (shorter.train.epochs, shorter.schedule.warmup_steps, shorter.to_flat()["valid_interval"]) == (None, 1, 4)


def test_the_sketches_config_is_a_run_with_the_fast_recipe() -> None:
    config, _ = parse_run(TorchConfig, ["--config", str(ROOT / "configs" / "sketches.yaml")])
    own = {"learning_rate", "min_lr"}
    assert {name for name, value in RECIPES["fast"].items() if config.to_flat()[name] != value} == own
    assert (config.train.keeps_best, config.to_flat()["sketches_interval"]) == (True, 600)


def test_intervals_may_be_shares_of_the_run() -> None:
    """Of one update at least, and counted once the run's length is known."""
    shares = ["--valid-interval", "10%", "--save-interval", "0.01%", "--sample-interval", "7", "--train-steps", "300"]
    train = parse_run(TorchConfig, shares)[0].train
    assert train.valid_interval == "10%"
    counted = train.in_updates()
    assert (counted.valid_interval, counted.save_interval, counted.sample_interval) == (30, 1, 7)
    assert counted.in_updates() == counted
    with pytest.raises(InputError, match="--valid-interval 0%: choose a share above 0%, or 0"):
        parse_run(TorchConfig, ["--valid-interval", "0%"])
    with pytest.raises(InputError, match=r"--neftune-alpha -1\.0: choose a number of at least 0"):
        parse_run(TorchConfig, ["--neftune-alpha", "-1"])


def test_a_run_written_as_json_reads_back_the_same(tmp_path: Path) -> None:
    config, _ = parse_run(TorchConfig, [*PUBLISHED_RECIPE, "--max-hours", "8.5", "--wandb-tags", "a,b", "--no-bias"])
    file = tmp_path / "run_config.json"
    file.write_text(json.dumps(config.to_flat()))
    again, _ = parse_run(TorchConfig, ["--config", str(file)])
    homes = {
        name: str(Path(f"~/.cache/gpt2xla/{part}").expanduser())
        for name, part in (("data_cache", "data"), ("scratch_dir", "runs"))
    }
    assert again.to_flat() == config.to_flat() | homes


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


def read(tmp_path: Path, text: str | bytes) -> dict:
    """What a config file with this text sets."""
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    config, _ = parse_run(TorchConfig, ["--config", str(file)])
    flat = config.to_flat()
    return {name: flat[name] for name in config.given}


UNDERSTOOD = {
    "wandb_tags: [a, b]": {"wandb_tags": "a,b"},
    "wandb_tags: [2026-11-26, 1.10]": {"wandb_tags": "2026-11-26,1.10"},
    "mixed_precision: no": {"mixed_precision": "none"},
    "mixed_precision: 'off'": {"mixed_precision": "none"},
    "mixed_precision: null": {},
    "activation_checkpointing: no": {"activation_checkpointing": "none"},
    "resume: no": {"resume": "never"},
    "resume: never": {"resume": "never"},
    "valid_steps: all": {"valid_steps": "all"},
    "valid_steps: 1e2": {"valid_steps": 100},
    "betas: '0.8 0.9'": {"betas": (0.8, 0.9)},
    "betas: 0.8, 0.9": {"betas": (0.8, 0.9)},
    "betas: ['0.8', .9]": {"betas": (0.8, 0.9)},
    "train_steps: 1e3": {"train_steps": 1000},
    "train_steps: 1_000": {"train_steps": 1000},
    "train_steps: '100'": {"train_steps": 100},
    "train_steps: 010": {"train_steps": 10},
    "learning_rate: 6e-4": {"learning_rate": 6e-4},
    "min_lr: 0": {"min_lr": 0.0},
    "seed:": {},
    "max_hours: ~": {},
    "wandb_name: 2026-01-02": {"wandb_name": "2026-01-02"},
    "wandb_name: 1.10": {"wandb_name": "1.10"},
    "wandb_name: 007": {"wandb_name": "007"},
    "wandb_name: 1:30": {"wandb_name": "1:30"},
    "wandb_name: 'no'": {"wandb_name": "no"},
    "shuffle: on": {"shuffle": True},
    "shuffle: 1": {"shuffle": True},
    "tie-weights: 'False'": {"tie_weights": False},
    "compile: null": {},
    "model: gpt2": {"from_checkpoint": "gpt2"},  # another name of it
    "activation: gelu": {"activation": "gelu-tanh"},
    "activation: gelu-exact": {"activation": "gelu-exact"},
    "seed: &x 3\ntrain_steps: *x": {"seed": 3, "train_steps": 3},
    "---\nseed: 3\n...\n": {"seed": 3},
    "# seed: 3\n": {},
    "{\n\t\"seed\": 3, \"wandb_name\": \"\\ud83d\\ude00\"}": {"seed": 3, "wandb_name": "\U0001f600"},
    '{"shuffle": true, "betas": [0.8, 0.9], "max_hours": null, "seed": 1e3}': {
        "shuffle": True, "betas": (0.8, 0.9), "seed": 1000,
    },
    b"\xef\xbb\xbfseed: 3\r\n": {"seed": 3},
    "seed: 3".encode("utf-16"): {"seed": 3},
}  # fmt: skip


@pytest.mark.parametrize(("text", "values"), UNDERSTOOD.items(), ids=map(str, UNDERSTOOD))
def test_a_config_file_is_read_as_a_person_reads_it(tmp_path: Path, text: str | bytes, values: dict) -> None:
    assert read(tmp_path, text) == values


# What the line must hold: the key, and the fix.
REFUSED = {
    "mixed_precision: yes": ["mixed_precision: yes was read as true", "none"],
    "mixed_precision: bf17": ["mixed_precision: 'bf17'", "bf16 or fp16"],
    "wandb_name: no": ["wandb_name: no was read as false", "quote it"],
    "wandb_tags: [no, b]": ["wandb_tags: 'no'", "quote"],
    "wandb_tags: ['a,b', c]": ["wandb_tags: 'a,b'"],
    "wandb_tags: []": ["wandb_tags: the list is empty"],
    "seed: true": ["seed: cannot be true", "a whole number"],
    "seed: [1]": ["seed: takes one value"],
    "betas: 0.9": ["betas: takes 2 values"],
    "betas: [0.9, [1]]": ["betas:", "a number"],
    "train_steps: 1.5": ["train_steps: '1.5'", "a whole number"],
    "train_steps: 1:30": ["train_steps: '1:30'"],
    "train_steps: 1e999999999": ["train_steps: '1e999999999'"],
    "learning_rate: 1,5": ["learning_rate: '1,5'", "a number"],
    "train: {train_steps: 3}": ["train has keys below it", "'train_steps: 3'"],
    "train_dir: {a: 0.7, b: 0.3}": ["train_dir", "[a=0.7, b=0.3]"],
    "train_dir: [a, null]": ["train_dir"],
    "checkpoints_dir: ~": ["checkpoints_dir: ~", "quote it"],
    "checkpoints_dir: ~nobody-here/x": ["checkpoints_dir: '~nobody-here/x'"],
    "seq_lenght: 3": ["seq_lenght", "did you mean seq_length?"],
    "batch_size: 3": ["batch_size", "did you mean train_batch_size?"],
    "n_layer: 3": ["n_layer", "did you mean num_layers?"],
    "Seed: 3": ["did you mean seed?"],
    "no_bias: true": ["no_bias", "'bias: false'"],
    "spmd: true": ["spmd", "run_pretrain_xla.py"],
    "seed: 1\nseed: 2": ["seed is set twice"],
    "train-steps: 1\ntrain_steps: 1": ["train_steps is set twice"],
    "model: gpt2\nfrom_checkpoint: gpt2": ["from_checkpoint is set twice"],
    '{"seed": 1, "seed": 2}': ["seed is set twice"],
    "seed: 1\n---\nseed: 2": ["several documents"],
    "train:\n\tseed: 1": ["line 2", "spaces instead of tabs"],
    " \n": ["is empty"],
    "hello": ["holds no options but text"],
    "shuffle: maybe": ["shuffle: 'maybe'", "true or false"],
    "activation: erf": ["activation: 'erf'", "gelu-exact"],
    "preset: gpt3": ["preset: 'gpt3'", "gpt2-xl"],
    "help: true": ["help is unknown"],
    "? [a]\n: 1": ["line 1 begins with no name"],
    "train_dir: &a [*a]": ["train_dir"],
    "seed: !mine 3": ["seed has the tag !mine"],
    b"seed: \xff": ["UTF-8"],
}


@pytest.mark.parametrize(("text", "parts"), REFUSED.items(), ids=map(str, REFUSED))
def test_a_config_file_that_is_not_clear_is_refused_by_key(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, text)
    line = str(error.value)
    assert line.startswith(f"--config {tmp_path / 'run.yaml'}: ")
    assert [part for part in parts if part not in line] == [], line
    assert "\n" not in line


def test_a_tilde_is_the_home_folder_wherever_a_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "checkpoints_dir: ~/runs\ntrain_dir: [~/a=0.7, gs://b/~c=0.3]\nwandb_name: ~/x\n"
    )
    config, options = parse_run(
        TorchConfig,
        [
            "--config=~/run.yaml",
            "--from-checkpoint",
            "~/model",
            "--valid-dir=~",
            "--compile-cache",
            "~/p",
            "--tokenizer",
            "x~",
        ],
    )
    assert (config.general.checkpoints_dir, config.general.from_checkpoint) == (f"{home}/runs", f"{home}/model")
    assert config.data.train_dir == (f"{home}/a=0.7", "gs://b/~c=0.3")
    assert (config.data.valid_dir, config.data.tokenizer) == (home, "x~")
    assert options.compile_cache == f"{home}/p"
    assert config.wandb.wandb_name == "~/x", "a name is no path"
    assert parse_run(TorchConfig, ["--checkpoints-dir", "./~x"])[0].general.checkpoints_dir == "./~x"
    with pytest.raises(InputError, match="--resume '~nobody-here'"):
        parse_run(TorchConfig, ["--resume", "~nobody-here"])


@pytest.mark.parametrize("url", ["gs:/bucket/run", "s3:bucket", "S3:/bucket", "s3://", "hf:///", "file://"])
def test_half_a_url_is_no_folder(url: str, tmp_path: Path) -> None:
    """As a folder it would lie on a disk that goes with its machine."""
    (tmp_path / "run.yaml").write_text(f'scratch_dir: "{url}"\n')
    for words in (["--checkpoints-dir", url], ["--train-dir", f"{url}=1"], ["--config", str(tmp_path / "run.yaml")]):
        if words[0] != "--train-dir" or not url.endswith("/"):
            with pytest.raises(InputError, match=re.escape(url)):
                parse_run(TorchConfig, words)
    assert parse_run(TorchConfig, ["--checkpoints-dir", f"./{url}x"])[0].general.checkpoints_dir == f"./{url}x"


@pytest.mark.parametrize("flag", ["--scratch-dir", "--data-cache"])
def test_what_is_kept_on_this_machine_takes_no_url(flag: str) -> None:
    with pytest.raises(InputError, match=f"{flag} gs://bucket/x: files are kept on this machine; name a folder"):
        parse_run(TorchConfig, [flag, "gs://bucket/x"])[0].check_early()


@pytest.mark.parametrize(
    "words", [["train_tokenizer.py", "--input", "."], ["convert_checkpoint.py", "--model", "gpt2"]], ids=lambda w: w[0]
)
def test_folders_that_programs_make_take_no_url(words: list[str]) -> None:
    result = run_here(f"scripts/{words[0]}", *words[1:], "--output-dir", "s3://bucket/x")
    assert result.returncode == 2
    assert "--output-dir s3://bucket/x: files are kept on this machine" in result.stderr


@pytest.mark.parametrize("name", ["gs://bucket/run/step-00000100", "checkpoints/step-00000100/"])
def test_a_run_does_not_lie_in_a_checkpoint(name: str) -> None:
    with pytest.raises(InputError, match="that is a checkpoint's name; name its run's folder"):
        parse_run(TorchConfig, ["--checkpoints-dir", name])[0].check_early()


@pytest.mark.parametrize("program", ["generate.py", *(f"scripts/{f.name}" for f in (ROOT / "scripts").glob("*.py"))])
def test_programs_take_paths_below_the_home_folder(program: str) -> None:
    """Every flag that takes a path says PATH, and only those expand ~."""
    text = run_here(program, "--help").stdout
    named = re.findall(
        r"^  (--[a-z-]*(?:dir|file|cache|output|model|models|tokenizer|config)) (\w+)", text, re.MULTILINE
    )
    assert {flag for flag, kind in named if kind != "PATH"} <= {"--config", "--d-model"}, "--config: of a data set"


def test_a_resumed_run_keeps_a_schedule_that_a_new_one_may_not_have() -> None:
    saved = {"warmup_steps": 50, "decay_steps": 1000, "train_steps": 10}
    resumed = RunConfig.from_flat(saved)
    for same in ({"warmup_steps": 50, "train_steps": 10}, {"decay_steps": 1000, "train_steps": 30_000}):
        run = RunConfig.from_flat(same)
        with pytest.raises(InputError, match=r"is not below --train-steps 10|which is 3\.75% of --train-steps"):
            run.check_schedule()
        RunConfig.from_flat(saved | same, same).check_schedule(resumed)
    with pytest.raises(InputError, match="--warmup-steps 60 is not below"):
        RunConfig.from_flat(saved | {"warmup_steps": 60}, {"warmup_steps"}).check_schedule(resumed)


def test_shares_of_a_run(tmp_path: Path) -> None:
    for text, steps in (("5%", 50), ("0.5%", 5), ("0%", 0), ("99.95%", 1000)):
        config, _ = parse_run(TorchConfig, ["--warmup-steps", text, "--train-steps", "1000"])
        assert config.schedule.warmup_steps == steps
        (tmp_path / "run.yaml").write_text(f"warmup_steps: {text}\ntrain_steps: 1000\n")
        assert parse_run(TorchConfig, ["--config", str(tmp_path / "run.yaml")])[0].to_flat()["warmup_steps"] == steps
    for text in ("105%", "5 %%", "-3%", "5 %", "%", ".5%", "1e1%", "five", "5%%"):
        with pytest.raises(InputError, match=r"--warmup-steps .*: choose a whole number or a share such as 5%"):
            parse_run(TorchConfig, [f"--warmup-steps={text}"])
    with pytest.raises(InputError, match="--warmup-steps 100% is not below --train-steps 20000"):
        parse_run(TorchConfig, ["--warmup-steps", "100%"])[0].check_schedule()


def test_a_run_config_of_a_method_that_uses_less_reads_back(tmp_path: Path) -> None:
    """Older ones hold --decay-steps and --min-lr for noam, too."""
    flat = RunConfig.from_flat({"decay_method": "noam"}).to_flat() | {"decay_steps": 20_000}
    (tmp_path / "run_config.json").write_text(json.dumps(flat))
    parse_run(TorchConfig, ["--config", str(tmp_path / "run_config.json")])[0].check_schedule()
