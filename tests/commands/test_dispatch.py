"""`gpt2xla COMMAND`: the programs of scripts/ under one name, and what they have in common."""

import sys
from pathlib import Path

import pytest
import tomllib
from conftest import ROOT, run_here

from gpt2xla.commands import dispatch
from gpt2xla.commands.dispatch import COMMANDS, main_of
from gpt2xla.processes.exits import exit_code

SCRIPTS = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]


def answer(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    """Exit code and output of `gpt2xla WORDS`."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/gpt2xla", *words])
    with pytest.raises(SystemExit) as end:
        sys.exit(exit_code(dispatch.run))
    shown = capsys.readouterr()
    return int(end.value.code or 0), shown.out + shown.err


def test_the_installed_command_is_the_dispatcher() -> None:
    module, _, name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["gpt2xla"].partition(
        ":"
    )
    assert getattr(sys.modules[module], name) is dispatch.main


def test_every_program_has_a_command() -> None:
    mains = {main_of(name).__module__ for name in COMMANDS} - {"gpt2xla.doctor", "gpt2xla.commands.completion"}
    called = {line.split()[1] for file in SCRIPTS for line in file.read_text().splitlines() if "import main" in line}
    assert mains == called


def test_help_lists_the_commands(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = answer(capsys, monkeypatch, "--help")
    assert code == 0
    assert all(f"  {name} " in text for name in COMMANDS)
    assert max(map(len, text.splitlines())) <= 80
    code, text = answer(capsys, monkeypatch, "prepare", "--help")
    assert code == 0
    assert "prepare fineweb" in text
    assert "generate" not in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("trian", "gpt2xla: error: trian: unknown command; did you mean train?"),
        ("gen", "gpt2xla: error: gen: unknown command; did you mean generate?"),
        ("xyz", "gpt2xla: error: xyz: unknown command; gpt2xla --help lists them"),
        ("prepare", "gpt2xla: error: prepare of what? Add text, fineweb, dataset, chat or sketches"),
        ("prepare txt", "gpt2xla: error: prepare txt: unknown; did you mean text?"),
        ("train --trian-steps 3", "gpt2xla train: error: --trian-steps is unknown; did you mean --train-steps?"),
        ("evaluate perplexity", "gpt2xla evaluate perplexity: error: add --model"),
    ],
)
def test_a_mistake_is_one_line(
    words: str, line: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = answer(capsys, monkeypatch, *words.split())
    assert code == 2
    assert text.startswith(line)
    assert len(text.splitlines()) == 1


# What a newcomer may write -> the flag that the one line names.
MEANT = {
    "run_pretrain.py --lr 1": "--learning-rate",
    "run_pretrain.py --num-epochs 1": "--epochs",
    "run_pretrain.py --batch-size 1": "--train-batch-size",
    "run_pretrain.py --checkpoint x": "--from-checkpoint",
    "run_pretrain.py --data x": "--train-dir",
    "run_pretrain_xla.py --output_dir x": "--checkpoints-dir",
    "generate.py --checkpoint x": "--model",
    "generate.py --max-tokens 5": "--max-new-tokens",
    "generate.py --temp 1": "--temperature",
    "generate.py --train-batch-size 5": "--batch-size",
    "scripts/recognise.py --checkpoint x": "--model",
    "scripts/perplexity_table.py --checkpoint x": "--model",
    "scripts/playground.py --server-port x": "--port",
    "scripts/eval_hellaswag.py --from-checkpoint x": "--model",
    "scripts/eval_mmlu.py --checkpoints x": "--model",
    "scripts/compare_models.py --val-dir x": "--valid-dir",
    "scripts/convert_checkpoint.py --checkpoint x": "--model",
    "scripts/inspect_data.py --tokeniser x": "--tokenizer",
    "scripts/plot_loss.py --out x": "--output",
    "scripts/prepare_text.py --data x": "--input",
    "scripts/prepare_text.py --out-dir x": "--output-dir",
    "scripts/prepare_dataset.py --workers 2": "--num-workers",
    "scripts/prepare_chat.py --block-size 2": "--seq-length",
    "scripts/prepare_sketches.py --workers 2": "--num-workers",
    "scripts/prepare_fineweb.py --limit 2": "--max-tokens",
    "scripts/train_tokenizer.py --vocab 2": "--vocab-size",
    "scripts/tpu_compile_check.py --batch_size 2": "--train-batch-size",
}


@pytest.mark.parametrize("command", MEANT)
def test_an_unknown_flag_is_answered_by_the_one_that_is_meant(command: str) -> None:
    """Also where a required flag is missing: it may be the misspelt one."""
    program, flag, value = command.split()
    result = run_here(program, flag, value)
    assert result.returncode == 2
    assert result.stderr == f"{Path(program).name}: error: {flag} is unknown; did you mean {MEANT[command]}?\n"


@pytest.mark.parametrize(
    "command",
    [
        "generate.py --model ./no/such --dtype fp32 --prompt x",
        "generate.py --model ./no/such --mixed_precision bf16 --device cpu",
        "run_pretrain.py --model ./no/such --mixed-precision fp32",
        "scripts/recognise.py --input README.md --model ./no/such --dtype fp32",
        "scripts/perplexity_table.py --models ./no/such --valid-dir . --mixed-precision fp32 --device cpu",
        "scripts/perplexity_table.py --model ./no/such --valid_dir .",
        "scripts/eval_hellaswag.py --hellaswag-data x --model ./no/such",
        "scripts/eval_mmlu.py --mmlu-data . --model ./no/such",
        "scripts/compare_models.py . ./no/such --mmlu",
        "scripts/compare_models.py --models . ./no/such --mmlu",
        "scripts/convert_checkpoint.py --input ./no/such --output-dir x",
        "scripts/inspect_data.py --data ./no/such",
        "scripts/inspect_data.py --train-dir=./no/such --documents 2",
        "scripts/plot_loss.py --output x.png --run ./no/such",
        "scripts/plot_loss.py --checkpoints-dir=./no/such",
    ],
)
def test_other_names_mean_the_same(command: str) -> None:
    """All words are understood: what is refused is the path."""
    result = run_here(*command.split())
    assert result.returncode == 2
    assert "no/such" in result.stderr
    assert "unknown" not in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_flags(
    shell: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("shtab", reason="needs shtab: pip install -e '.[completion]'")
    code, text = answer(capsys, monkeypatch, "completion", shell)
    assert code == 0
    assert all(
        word in text for word in ("prepare", "fineweb", "hellaswag", "--gradient-accum-step", "--max-new-tokens")
    )


def test_completion_without_its_library_names_the_fix(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, text = answer(capsys, monkeypatch, "completion", "bash")
    assert code == 2
    assert "pip install 'gpt2xla[completion]'" in text
