"""What the tabs do, without a browser: which models there are, what is shown of a text, and the thread of the models."""

from __future__ import annotations

import gc
import html
import itertools
import json
import math
import re
import shutil
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import run_here, run_xla, succeed
from transformers import AutoModelForCausalLM

from gpt2xla.data.tokenizer import load_tokenizer
from gpt2xla.errors import InputError, RunFailed
from gpt2xla.playground.address import listen
from gpt2xla.playground.models import Models
from playground.small_models import STEPS, run, untrained

pytest.importorskip("gradio", reason="needs Gradio: pip install -e '.[playground]'")

from gpt2xla.playground import events
from gpt2xla.playground.chat_tab import Talk, answer
from gpt2xla.playground.choices import percent
from gpt2xla.playground.controls import asked
from gpt2xla.playground.write_tab import write

GREEDY = (0, 12, 0, 1, 1, "0", "")
LAST, FIRST = (f"run/step-{step:08d}" for step in reversed(STEPS))


@pytest.fixture
def opened_from(models: list[Path]) -> Models:
    return Models([str(model) for model in models], None, "cpu", "none")


def test_only_what_is_named_is_offered(models: list[Path], tmp_path: Path) -> None:
    """A run's checkpoints one by one, also those that it saves later; a model alone by its folder's name."""
    folder = Path(shutil.copytree(models[0], tmp_path / "run", symlinks=True))
    found = Models([str(folder), str(models[1]), f"{folder}/"], "bytes", "cpu", "none")
    assert found.names() == ["run@latest", LAST, FIRST, "chat"]
    assert found.runs == {"run": folder}
    assert (found.any_chats, found.any_draws) == (False, False)  # by the tokenizer that was named
    shutil.copytree(folder / LAST[4:], folder / "step-00000030")
    (folder / "best.json").write_text(json.dumps({"step": STEPS[0], "valid_loss": 4.0}))
    assert found.names() == ["run@latest", "run@best", "run/step-00000030", LAST, FIRST, "chat"]
    with found.opened("run@best") as best:
        assert best.folder == folder / FIRST[4:]
    shutil.rmtree(folder / FIRST[4:])
    for name in (FIRST, "/etc", str(models[2]), "../chat", str(folder), "run", ""):
        with pytest.raises(InputError, match="there is no model"), found.opened(name):
            pass


def test_two_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [run(tmp_path / name / "checkpoints") for name in "ab"]
    names = Models([str(root) for root in runs], None, "cpu", "none").names()
    assert names[0] == f"{runs[0]}@latest"
    assert len(set(names)) == 6


def test_one_model_is_in_memory(opened_from: Models) -> None:
    with opened_from.opened(LAST) as first:
        known = weakref.ref(first.model)
    with opened_from.opened("run@latest") as same:  # another name of the same one
        assert same.model is known()
    del first, same
    with opened_from.opened(FIRST):
        gc.collect()
        assert known() is None


def test_a_damaged_model_is_refused_at_the_start(tmp_path: Path) -> None:
    folder = untrained(tmp_path / "model", load_tokenizer("bytes"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        Models([str(folder)], None, "cpu", "none")
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="model"):
        Models([str(folder)], "bytes", "cpu", "none")


def test_probabilities_are_those_of_hugging_face(opened_from: Models, models: list[Path]) -> None:
    """Token by token of a greedy text, and what else was likely."""
    theirs = AutoModelForCausalLM.from_pretrained(models[0] / LAST[4:]).requires_grad_(False)
    prompt = "<a & b> {{1}} ${2}"
    *_, page = write(opened_from, LAST, prompt, *GREEDY)
    assert page.startswith(f'<div class="written"><span class="prompt">{html.escape(prompt)}</span>')
    assert page.endswith('</div><p class="note">12 tokens, cut</p>')
    spans = re.findall(r'--unlikely:([0-9.]+)" data-tip="([^"]*)"', page)
    tips = [tip for _, tip in spans for tip in html.unescape(tip).split("\n\n")]
    assert len(tips) == 12
    ids = load_tokenizer("bytes").encode(prompt)
    for tip in tips:
        likely = theirs(torch.tensor([ids])).logits[0, -1, :257].double().softmax(-1).topk(5)
        lines = tip.splitlines()
        assert [line[0] for line in lines] == ["▸", *"    "]  # the first is the one that was drawn
        assert [line[2:].split()[0] for line in lines] == [percent(float(p)) for p in likely.values]
        ids.append(int(likely.indices[0]))
    shade = min(1, -math.log10(float(likely.values[0])) / 3)
    assert float(spans[-1][0]) == pytest.approx(shade, abs=0.006)


def test_a_page_of_a_text_only_grows(opened_from: Models) -> None:
    """So that little is sent for each token."""
    pages = [*write(opened_from, LAST, "x", 1, 30, 0, 1, 1, "5", "")]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(pages))
    assert pages[-1].endswith("30 tokens, cut, seed 5</p>")


def test_where_a_text_ends(opened_from: Models) -> None:
    *_, cut = write(opened_from, LAST, "x", 1, 40, 0, 1, 1, "5", "")
    text = shown(cut).removesuffix("40 tokens, cut, seed 5")
    stop = next(text[i] for i in range(10, 30) if text[i].isprintable() and text[i] not in text[: i - 1] + " \ufffd")
    *_, stopped = write(opened_from, LAST, "x", 1, 40, 0, 1, 1, "5", f"\n{stop}\n")
    assert shown(stopped).startswith(text[: text.index(stop)])
    assert "ended before a stop text" in stopped
    *_, by_itself = write(opened_from, "chat", "<|im_start|>", 0, 200, 0, 1, 1, "5", "")
    assert "special token" in by_itself  # it was read as letters


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ((0, 0, 0, 1, 1, 0, ""), (0, 10**6, 0, 1, 1, 0, ""), (-1, 9, 0, 1, 1, 0, ""), (1, 9, 0, 0, 1, 0, "")):
        with pytest.raises(InputError):
            asked(*wrong)
    assert asked(1, 9, 0, 1, 1, None, None).seed != asked(1, 9, 0, 1, 1, None, None).seed


def test_an_answer_that_is_stopped_stays(opened_from: Models) -> None:
    steps = answer(opened_from, "chat", "red", Talk(), "", *GREEDY)
    stopped = next(talk for _, _, talk, _ in steps if talk.shown)
    steps.close()
    partly = stopped.shown[-1]["content"]
    assert "an apple".startswith(partly) and partly != "an apple"  # noqa: PT018
    *_, (box, messages, talk, note) = answer(opened_from, "chat", "red", Talk(), "", *GREEDY)
    assert (box, note) == ("", "")
    assert messages == [{"role": "user", "content": "red"}, {"role": "assistant", "content": "an apple"}]
    for _ in range(3):
        *_, (_, messages, talk, note) = answer(opened_from, "chat", "blue", talk, "", *GREEDY)
    assert "oldest turn" in note  # they do not all fit, but are shown
    assert len(messages) == 8 > len(talk.read)
    with pytest.raises(InputError, match="empty"):
        next(answer(opened_from, "chat", "  ", Talk(), "", *GREEDY))
    with pytest.raises(InputError, match="too long"):
        next(answer(opened_from, "chat", "red", Talk(), "system " * 50, *GREEDY))


def test_work_is_done_in_one_thread_and_the_newest_results_are_shown(opened_from: Models) -> None:
    done, go = threading.Event(), threading.Event()

    def work(count: int) -> Iterator[tuple[int, str]]:
        try:
            yield 0, threading.current_thread().name
            go.wait()
            for number in range(1, count):
                yield number, threading.current_thread().name
        finally:
            done.set()

    results = events._in_thread(opened_from, work)(1000)
    assert next(results) == (0, "models")
    go.set()
    done.wait()
    rest = [*results]
    assert rest[-1] == (999, "models")
    assert len(rest) < 999
    done.clear()
    stopped = events._in_thread(opened_from, work)(10**9)
    next(stopped)
    stopped.close()  # as Gradio does when a visitor stops it, or leaves
    assert done.wait(10)
    assert [*events._in_thread(opened_from, lambda x: x + 1)(1)] == [2]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (InputError("<i>"), "&lt;i&gt;"),
        (RunFailed("NaN"), "NaN"),
        (MemoryError(), "memory has run out"),
        (KeyError("x"), "the terminal shows it"),
    ],
)
def test_errors_are_notes(
    error: Exception, text: str, opened_from: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    told: list[str] = []
    monkeypatch.setattr(events.gr, "Warning", told.append)

    def work() -> Iterator[int]:
        yield 1
        raise error

    assert [*events._in_thread(opened_from, work)()] == [1]
    assert text in told[0]
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, KeyError)


def test_addresses(capsys: pytest.CaptureFixture) -> None:
    with listen("127.0.0.1", 0) as address:
        port = address.url.split(":")[-1].strip("/")
        with pytest.raises(InputError, match=f"--port {port}: .*in use"), listen("127.0.0.1", int(port)):
            pass
    with pytest.raises(InputError, match="--host no"), listen("no.such.host", 0):
        pass
    assert capsys.readouterr().err == ""
    with listen("0.0.0.0", 0) as address:
        assert address.url.startswith("http://localhost:")
    assert capsys.readouterr().err.startswith("warning: --host 0.0.0.0: everyone on the network")


def test_the_missing_library_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch, models: list[Path]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = run_here("scripts/playground.py", "--model", models[1])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "playground.py: error: the playground needs Gradio; pip install 'gpt2xla[playground]'\n"


@pytest.mark.slow
def test_on_xla_all_texts_take_two_programs(models: list[Path], opened_from: Models) -> None:
    on_xla = json.loads(succeed(run_xla(models[1], "chat", program="tests/workers/playground_worker.py")))
    *_, here = write(opened_from, "chat", "red", *GREEDY)
    assert on_xla[0][0] == shown(here)
    assert [text for text, _ in on_xla[4:]] == ["an apple", "the sky"]
    assert [compiled for _, compiled in on_xla] == [1, 2, 2, 2, 2, 2]  # the first text ends at once


def shown(page: str) -> str:
    """The text of some HTML."""
    return html.unescape(re.sub("<[^>]*>", "", page))
