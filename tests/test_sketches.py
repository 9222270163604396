"""docs/sketches.md from its first command to its last, on 38 drawings: on the torch runtime in this process, and in
processes of their own on both runtimes, which must agree."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, metrics, require_xla
from PIL import Image, ImageDraw

from gpt2xla.checkpoint.run_folder import list_checkpoints
from gpt2xla.data.shards import TokenStream
from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.sketches.format import SketchFormat, picture_text

PAGE = (ROOT / "docs" / "sketches.md").read_text(encoding="utf-8")
BLOCKS = [
    text for how, text in re.findall(r"<!-- test: ([^>]*?) -->\n```bash\n(.*?)```", PAGE, re.DOTALL)
    if "tests/test_sketches.py" in how
]  # fmt: skip
# Appended to the programs' own; the last value of a flag wins.
SMALL = {
    "prepare_sketches.py": "--augment 3 --test-fraction 0.2 --num-workers 1",
    "run_pretrain.py": "--d-model 16 --num-layers 1 --num-heads 2 --sequences-per-update 8 --train-batch-size 8 "
    "--gradient-accum-step 1 --eval-batch-size 8 --train-steps 6 --warmup-steps 1 --valid-interval 6 --sketches-interval 6 "
    "--save-interval 6",
    "generate.py": "--seed 1",
}
Run = Callable[[list[str], Path, str], str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the repository's programs, drawings, and what is to be recognised."""
    for name in ("run_pretrain.py", "run_pretrain_xla.py", "generate.py", "scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "quickdraw").symlink_to(ROOT / "tests" / "sketches" / "quickdraw")
    for name, paper, ink in (("my-drawing.png", 255, 0), ("photo.jpg", 180, 60)):
        image = Image.new("L", (120, 120), paper)
        ImageDraw.Draw(image).ellipse([20, 30, 100, 110], outline=ink, width=6)
        image.save(tmp_path / name)
    stripes = np.arange(24 * 24).reshape(24, 24) % 5 == 0
    (tmp_path / "my-drawing.txt").write_text(picture_text(stripes))
    return tmp_path


def commands() -> list[list[str]]:
    lines = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines]


def follow(folder: Path, run: Run) -> list[str]:
    """Run all commands of the page, and return what each printed."""
    printed = []
    for words in commands():
        words, _, file = (words, "", "") if "<" not in words else (words[:-2], "<", words[-1])
        given = (folder / file).read_text() if file else ""
        printed.append(run([*words, *SMALL.get(Path(words[1]).name, "").split()], folder, given))
    return printed


def in_this_process(words: list[str], folder: Path, given: str) -> str:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        patch.setattr(sys, "argv", words[1:])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(words[1], run_name="__main__")
    assert not end.value.code, f"{shlex.join(words)}\n{out.getvalue()}"
    return out.getvalue()


def on(runtime: str) -> Run:
    """Return what runs a command in a process of its own."""

    def run(words: list[str], folder: Path, given: str) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
        words = [sys.executable, *words[1:]]
        if runtime == "xla":
            environment["PJRT_DEVICE"] = "CPU"
            if words[1] == "run_pretrain.py":
                words[1] = "run_pretrain_xla.py"
            elif words[1] in ("generate.py", "scripts/recognise.py"):
                words += ["--device", "xla"]
        result = subprocess.run(
            words, cwd=folder, env=environment, input=given, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}{result.stderr}"
        return result.stdout

    return run


def check(folder: Path, printed: list[str]) -> None:
    """The claims of the page, on what the commands wrote and printed."""
    prepared, trained, drawn, recognised, several, as_json = printed
    assert "72 tokens for each picture; 12 of 12 words are one token" in prepared
    sketches = SketchFormat.of(load_tokenizer(str(folder / "sketch-data" / "train")))
    assert (sketches.size, sketches.stroke_width, len(sketches.words)) == (24, 2, 12)
    counts = {}
    for split in ("train", "test"):
        stream = TokenStream(folder / "sketch-data" / split)
        counts[split] = len(sketches.sketches(stream.read(0, stream.length)))
    assert counts["train"] // 4 + counts["test"] == 38, "each drawing in one split, with its copies in train/ only"

    (line,) = [line for line in metrics(folder / "sketch-model") if "sketch_top1" in line]
    assert line["sketch_drawings"] == counts["test"]
    assert 0 <= line["sketch_top1"] <= line["sketch_top5"] <= 1
    assert f"top-5 {line['sketch_top5']:.4f} of {counts['test']} held-out drawings" in trained
    assert (folder / "sketch-model" / line["sketches"]).read_bytes().startswith(b"\x89PNG")
    assert SketchFormat.of(load_tokenizer(str(list_checkpoints(folder / "sketch-model")[-1]))).stroke_width == 2

    rows = drawn.splitlines()
    assert len(rows) % 12 in (0, 1), "24 rows of pixels, with an empty line between rows of samples"
    assert set(drawn) <= set(" ▀▄█\n")
    named = recognised.splitlines()
    assert len(named) == 12 + 5
    assert {line[: line.index("%")].rpartition(" ")[0].strip() for line in named[12:]} <= set(sketches.words)
    assert len(several.splitlines()) == 2 * (1 + 12 + 3) + 1
    found = json.loads(as_json)
    assert found["file"] == "-"
    assert len(found["words"]) == 5


def test_the_commands_of_the_page_lead_from_drawings_to_a_model_that_draws(folder: Path) -> None:
    check(folder, follow(folder, in_this_process))


@pytest.mark.slow
def test_the_page_on_both_runtimes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    require_xla()
    other = tmp_path_factory.mktemp("other")
    for path in folder.iterdir():
        (other / path.name).symlink_to(path.resolve())
    printed = {}
    for runtime, place in (("torch", folder), ("xla", other)):
        printed[runtime] = follow(place, on(runtime))
        check(place, printed[runtime])
    one, two = (
        [m.get("loss", m.get("valid_loss")) for m in metrics(place / "sketch-model")] for place in (folder, other)
    )
    assert [loss for loss in one if loss] == pytest.approx([loss for loss in two if loss], rel=1e-5)
    torch_words, xla_words = (json.loads(lines[-1])["words"] for lines in printed.values())
    assert {w["word"]: w["probability"] for w in torch_words} == pytest.approx(
        {w["word"]: w["probability"] for w in xla_words}, rel=1e-3
    )
