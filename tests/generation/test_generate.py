"""generate.py as a user runs it."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run, run_here, run_xla, succeed

from gpt2xla.checkpoint.formats import hugging_face as hf
from gpt2xla.commands.generate import GenerateConfig
from gpt2xla.config import ModelConfig
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.generation.sampling import USUAL
from gpt2xla.generation.settings import GenerationSettings
from gpt2xla.model.gpt2 import GPT2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model over bytes, in Hugging Face's layout, with its tokenizer; it never ends a text itself."""
    folder = tmp_path_factory.mktemp("bytes-model")
    config = ModelConfig(vocab_size=320, seq_length=64, d_model=32, num_layers=2, num_heads=2)
    gpt2 = GPT2(config)
    gpt2.init_weights()
    with torch.no_grad():
        end_of_text = gpt2.wte.weight[256]
        gpt2.ln_f.bias.copy_(-5 * end_of_text / end_of_text.square().sum())  # its logit is lower by 5
    hf.save_model(folder, config, gpt2.state_dict(), GenerationSettings.ending_with(256))
    load_tokenizer("bytes").save(folder)
    return folder


def test_text_continues_and_the_seed_decides(model: Path) -> None:
    arguments = ["--model", model, "--prompt", "Hello 🙂", "--max-new-tokens", 100, "--top-k", 30, "--top-p", 0.9]
    first = succeed(run("generate.py", *arguments, "--seed", 1))  # another process
    assert first.startswith("Hello 🙂")
    assert len(first) > 30
    assert succeed(run_here("generate.py", *arguments, "--seed", 1)) == first
    assert succeed(run_here("generate.py", *arguments, "--seed", 2)) != first


def test_prompts_are_asked_for_until_the_end_of_input_and_each_draws_differently(model: Path) -> None:
    """Prompt number n of a session, from 0, draws with the seed + n; the seed is printed."""
    flags = ["--model", model, "--max-new-tokens", 20]
    result = subprocess.run(
        [sys.executable, "generate.py", *map(str, flags)],
        cwd=ROOT, input="one\n\none", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0
    seed = int(re.fullmatch(r"seed (\d+): add --seed \1 to get these texts again\n", result.stderr)[1])
    texts = [succeed(run_here("generate.py", *flags, "--prompt", "one", "--seed", seed + n)) for n in range(2)]
    assert texts[0] != texts[1]
    assert result.stdout == f">> {texts[0]}>> >> {texts[1]}>> \n"


def test_without_a_seed_each_start_draws_differently_and_prints_the_seed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("Hello\n")
    for flags in (["--prompt", "Hello"], ["--prompts-file", tmp_path / "in.txt"]):
        flags = ["--model", model, "--max-new-tokens", 30, *flags]
        first, second = (run_here("generate.py", *flags) for _ in range(2))
        assert succeed(first) != succeed(second)
        (seed,) = re.findall(r"^seed (\d+): add --seed", first.stderr, re.MULTILINE)
        again = run_here("generate.py", *flags, "--seed", seed)
        assert (succeed(again), again.stderr) == (first.stdout, "")
    assert run_here("generate.py", *flags, "--temperature", 0).stderr == ""


def test_what_is_drawn_from_is_what_samples_during_training_are_drawn_from() -> None:
    assert (GenerateConfig(model="x").temperature, GenerateConfig(model="x").top_k) == (USUAL.temperature, USUAL.top_k)


def test_ctrl_c_stops_a_text_and_asks_again(model: Path) -> None:
    terminal, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "generate.py", "--model", str(model), "--max-new-tokens", "1000000"],
        cwd=ROOT, stdin=slave, stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)

    def seen_within(text: bytes, seconds: float) -> bool:
        seen, deadline = b"", time.monotonic() + seconds
        while text not in seen and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 4096)
        return text in seen

    try:
        assert seen_within(b">> ", 60)
        os.write(terminal, b"abcdef\n")
        assert seen_within(b"abcdef\r\nabcdef", 60)
        for _ in range(2):  # in the midst of a text, and at the prompt
            # Python loses a signal that comes between showing a prompt and waiting for input.
            assert any(process.send_signal(signal.SIGINT) or seen_within(b">> ", 5) for _ in range(10))
        os.write(terminal, b"\x04")  # Ctrl-D
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(terminal)


def test_a_file_of_prompts_becomes_json_lines(model: Path, tmp_path: Path) -> None:
    """Blank lines are no prompts; each text is that of the prompt alone, and sample 1 that of the next seed's sample 0."""
    prompts, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    prompts.write_bytes("Hello\n\n  \nÜber alle\r\nx".encode())
    flags = ["--model", model, "--max-new-tokens", 30, "--top-k", 40, "--seed", 4, "--device", "cpu"]
    files = ["--prompts-file", prompts, "--output", output, "--batch-size", 2, "--num-samples", 2]
    assert succeed(run_here("generate.py", *flags, *files)) == ""
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["Hello", "Über alle", "x"]
    assert [line["prompt_tokens"] for line in lines] == [5, 10, 1]
    assert all(line["new_tokens"] == [30, 30] and len(set(line["texts"])) == 2 for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.jsonl"]
    for seed, text in zip((4, 5), lines[1]["texts"], strict=True):
        alone = succeed(run_here("generate.py", *flags, "--prompt", "Über alle", "--seed", seed))
        assert alone == f"Über alle{text}\n"


def test_several_samples_are_shown_one_after_another(model: Path) -> None:
    flags = ["--model", model, "--prompt", "Hi", "--max-new-tokens", 5, "--num-samples", 3, "--dtype", "bf16"]
    shown = succeed(run_here("generate.py", *flags))
    assert [f"--- sample {n} of 3 ---\nHi" in shown for n in (1, 2, 3)] == [True] * 3


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("Hello\n", encoding="utf-8-sig")
    shown = succeed(
        run_here("generate.py", "--model", model, "--max-new-tokens", 1, "--prompts-file", tmp_path / "in.txt")
    )
    assert json.loads(shown)["prompt"] == "Hello"


@pytest.mark.parametrize(
    ("output", "culprit"),
    [("in.txt", "is the --prompts-file itself"), ("", "no file"), ("none/out.jsonl", "there is no folder")],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_generated(
    model: Path, tmp_path: Path, output: str, culprit: str
) -> None:
    (tmp_path / "in.txt").write_text("Hello\n")
    files = ["--prompts-file", tmp_path / "in.txt", "--output", tmp_path / output]
    result = run_here("generate.py", "--model", model, *files)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert culprit in result.stderr
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("in.txt", "Hello\n")]


def test_killed_in_the_midst_it_leaves_an_earlier_output_alone(model: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    prompts.write_text("Hello\n" * 10000)
    output.write_text("earlier\n")
    flags = ["--prompts-file", str(prompts), "--output", str(output), "--batch-size", "1"]
    process = subprocess.Popen([sys.executable, "generate.py", "--model", str(model), *flags], cwd=ROOT)
    partial, deadline = tmp_path / "out.jsonl.partial", time.monotonic() + 60
    while time.monotonic() < deadline and not (partial.exists() and partial.read_text().count("\n") >= 2):
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert output.read_text() == "earlier\n"
    whole = partial.read_text().rpartition("\n")[0].splitlines()
    assert all(json.loads(line)["prompt"] == "Hello" for line in whole)


@pytest.mark.parametrize(("prompts", "culprit"), [(b"\n \n", "holds no prompt"), (b"\xff\xfe", "not UTF-8")])
def test_a_file_without_prompts_is_refused_and_nothing_written(
    model: Path, tmp_path: Path, prompts: bytes, culprit: str
) -> None:
    (tmp_path / "in.txt").write_bytes(prompts)
    files = ["--prompts-file", tmp_path / "in.txt", "--output", tmp_path / "out.jsonl"]
    result = run_here("generate.py", "--model", model, *files)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert culprit in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_on_xla_the_text_is_the_same(model: Path) -> None:
    flags = ["--model", model, "--prompt", "Hello", "--max-new-tokens", 40, "--temperature", 0]
    here = succeed(run_here("generate.py", *flags, "--device", "cpu"))
    assert succeed(run_xla(*flags, "--device", "xla", program="generate.py")) == here


def test_a_device_that_is_not_there_is_refused(model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    result = run_here("generate.py", "--model", model, "--prompt", "x", "--device", "cuda")
    assert result.returncode == 2
    assert "--device cuda: torch finds none here" in result.stderr


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--model", "no/such/folder/here"], "no/such/folder/here"),
        (["--model", "README.md"], "README.md"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--top-p", "0"], "--top-p 0"),
        (["--top-k", "-1"], "--top-k -1"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--tokenizer", "klingon"], "klingon"),
        (["--repetition-penalty", "0"], "--repetition-penalty 0"),
        (["--repetition-penalty", "1e-300"], "--repetition-penalty 1e-300"),
        (["--temperature", "1e-300"], "--temperature 1e-300"),
        (["--model", ""], "the model's name is empty"),
        (["--prompt", "a\udcffb"], "--prompt is not UTF-8"),
        (["--num-samples", "0"], "--num-samples 0"),
        (["--num-samples", "2", "--temperature", "0"], "--num-samples 2: all would be the same"),
        (["--stop", ""], "--stop"),
        (["--output", "x.jsonl"], "--output"),
        (["--prompts-file", "prompts.txt"], "--prompts-file"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_wrong_input_is_one_line(model: Path, flags: list[str], culprit: str) -> None:
    result = run_here("generate.py", "--model", model, "--prompt", "x", *flags)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert culprit in result.stderr


def test_a_model_is_required() -> None:
    result = run("generate.py")
    assert result.returncode == 2
    assert "--model" in result.stderr
