"""Random command lines, configuration files, shards, manifests and checkpoints, run up to the first batch: the runner works,
or it ends with one line that names the culprit and leaves nothing behind.

GPT2XLA_FAULTS=full draws ten times as many. The draws are the same each time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, SMALL_RUN, prepare_documents, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2xla.checkpoint import start
from gpt2xla.config import GROUPS, TorchConfig, flag, options_of
from gpt2xla.files import file_sha256
from gpt2xla.processes.exits import exit_code
from gpt2xla.training.trainer import Trainer

SECONDS_PER_EXAMPLE = 60  # ends a hang; an example normally takes a tenth of a second
TIMES = 10 if os.environ.get("GPT2XLA_FAULTS") == "full" else 1
KINDS = {f.name: str(f.type) for group in (*GROUPS.values(), TorchConfig) for f in options_of(group)}
SIZES = ("vocab_size", "seq_length", "d_model", "num_layers", "num_heads", "d_ff")


def examples(count: int) -> Callable[[Callable], Callable]:
    return settings(
        max_examples=count * TIMES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class Hang(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    prepare_documents(folder / "data")
    data = ["--train-dir", folder / "data" / "train", "--valid-dir", folder / "data" / "test"]
    flags = [*SMALL_RUN, "--vocab-size", 257, "--train-steps", 2, "--checkpoints-dir", folder / "run"]
    result = run("run_pretrain.py", *data, *flags)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module", autouse=True)
def up_to_the_first_batch() -> Iterator[None]:
    def read_one(self: Trainer, first_step: int, is_evaluated: bool) -> tuple[int, bool]:
        next(self.order.batches(first_step))
        self.log.close()
        return self.config.train_steps, True

    def no_server(**settings: Any) -> None:
        raise RuntimeError("no server")

    wandb = types.ModuleType("wandb")
    wandb.Settings, wandb.init = types.SimpleNamespace, no_server  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", read_one)
        patch.setattr(start, "_memory_bytes", lambda: 10**9)  # models that a larger machine would build
        patch.setitem(sys.modules, "wandb", wandb)
        patch.chdir(ROOT)
        patch.syspath_prepend(str(ROOT))
        yield


def attempt(argv: list[str]) -> tuple[int, str]:
    """Run the runner in this process. Return its exit code and stderr."""
    import run_pretrain

    def ring(number: int, frame: object) -> None:
        raise Hang

    out, err = io.StringIO(), io.StringIO()
    before, handler = sys.argv, signal.signal(signal.SIGALRM, ring)
    sys.argv = ["run_pretrain.py", *argv]
    signal.alarm(SECONDS_PER_EXAMPLE)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = exit_code(run_pretrain.main)
            except SystemExit as end:  # --help
                code = int(end.code or 0)
            except Exception:
                traceback.print_exc()
                code = 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        sys.argv = before
    out.getvalue().encode("utf-8", "surrogateescape")
    return code, err.getvalue()


def check(argv: list[str], out: Path) -> None:
    code, error = attempt(argv)
    about = f"{argv}\n{error}"
    assert "Traceback" not in error, about
    assert code in (0, 1, 2), about
    if code:
        lines = [line for line in error.splitlines() if not line.startswith("wandb failed")]
        assert len(lines) == 1, about
        values = [argument.partition("=")[2] or argument for argument in argv]
        culprits = ["--", "/", *(f" {value} " for value in values), *map(repr, values)]
        assert lines[0].startswith("run_pretrain.py: error: "), about
        assert any(culprit in lines[0][len("run_pretrain.py: error:") :] for culprit in culprits), about
        assert len(lines[0]) < 3000 + max(map(len, argv)), about
        assert not out.exists(), f"something is left\n{about}"


def base(data: Path, out: Path) -> list[str]:
    folders = ["--train-dir", data / "train", "--valid-dir", data / "test", "--checkpoints-dir", out]
    return [*map(str, folders), *SMALL_RUN, "--vocab-size", "257", "--train-steps", "2"]


ABSURD = [
    "", " ", "-", "--", "\n", "none", "null", "nan", "inf", "-inf", "1e999", "0x10", "1_000", "\u0663", "/", "/dev/null",
    "/proc/self/mem", "/no/such/place", "/etc/passwd", "a=b", "=", "a=nan", "x" * 300, "x" * 5000, "../" * 40, "nosuch://x",
    "~",
    "~nobody-here/x", ".", "gpt2xla", "pyproject.toml", "\udcff", "\u00e9\u202e", "%s%n", "{0}", "a\tb", "auto", "never",
]  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(ABSURD), st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=20)
)
INTEGERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 7, 2**20, 2**20 + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400]),
    st.integers(-5, 40),
)  # fmt: skip
LARGE_OR_SMALL = st.sampled_from([-1, 0, 1, 2, 3, 8, 16, 32, 64, 10**9, 2**31, 2**62, 2**63, 10**30, 10**400])
FLOATS = st.one_of(st.floats(), st.floats(0, 1), INTEGERS)


def value_of(name: str) -> st.SearchStrategy[Any]:
    """Draw a value, three times in four of the right kind."""
    kind = KINDS[name]
    if name in SIZES:
        return LARGE_OR_SMALL
    choices = re.findall(r'"([^"]+)"', kind)
    right = (
        st.sampled_from(choices) if choices
        else st.lists(FLOATS, min_size=1, max_size=3) if "float, float" in kind
        else st.lists(TEXTS, min_size=1, max_size=3) if "tuple" in kind
        else st.booleans() if kind == "bool"
        else FLOATS if "float" in kind
        else INTEGERS if "int" in kind
        else TEXTS
    )  # fmt: skip
    return st.one_of(right, right, right, TEXTS, INTEGERS, FLOATS)


# A folder of that name would be made, which is right but gets in the way.
NAMES = st.sampled_from(sorted(KINDS.keys() - {"checkpoints_dir", "data_cache", "compile"}))
OPTIONS = st.lists(NAMES.flatmap(lambda name: st.tuples(st.just(name), value_of(name))), min_size=1, max_size=4)


def as_arguments(name: str, value: Any) -> list[str]:
    if isinstance(value, bool) and KINDS[name] == "bool":
        return [flag(name) if value else flag(name).replace("--", "--no-", 1)]
    return [flag(name), *map(str, value)] if isinstance(value, list) else [f"{flag(name)}={value}"]


@contextlib.contextmanager
def room() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        yield Path(folder)


@examples(40)
@given(options=OPTIONS)
def test_command_lines(whole: Path, options: list[tuple[str, Any]]) -> None:
    with room() as folder:
        flags = [argument for name, value in options for argument in as_arguments(name, value)]
        check([*base(whole / "data", folder / "out"), *flags], folder / "out")


@examples(5)
@given(
    words=st.lists(st.one_of(TEXTS, NAMES.map(flag), st.sampled_from(["--preset", "--config", "--help"])), max_size=6)
)
def test_words_that_are_no_command_line(whole: Path, words: list[str]) -> None:
    with room() as folder:
        check([*base(whole / "data", folder / "out"), *words], folder / "out")


@pytest.mark.parametrize("option", ["--train-dir", "--valid-dir", "--resume", "--from-checkpoint", "--tokenizer"])
def test_names_too_long_for_a_file(whole: Path, option: str) -> None:
    with room() as folder:
        check([*base(whole / "data", folder / "out"), option, "x" * 5000], folder / "out")


SCALARS = st.one_of(st.none(), st.booleans(), INTEGERS, FLOATS, TEXTS)
FLAT = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(TEXTS, SCALARS, max_size=3))
JSON = st.one_of(SCALARS, st.lists(FLAT, max_size=3), st.dictionaries(TEXTS, FLAT, max_size=3))


@examples(12)
@given(options=st.dictionaries(NAMES, JSON, min_size=1, max_size=4), is_json=st.booleans())
def test_yaml_of_options(whole: Path, options: dict[str, Any], is_json: bool) -> None:
    text = json.dumps(options) if is_json else yaml.safe_dump(options, allow_unicode=True)
    try_yaml(whole, text.encode("utf-8", "surrogatepass"))


@examples(8)
@given(text=st.one_of(
    st.binary(max_size=60),
    st.text(st.sampled_from(list("abc:-[]{}&*!|>'\"#%@`?,\n 01.~<=\t")), max_size=60).map(lambda text: text.encode()),
))  # fmt: skip
def test_yaml_of_anything(whole: Path, text: bytes) -> None:
    try_yaml(whole, text)


def try_yaml(whole: Path, text: bytes) -> None:
    with room() as folder:
        (folder / "run.yaml").write_bytes(text)
        argv = ["--config", str(folder / "run.yaml"), "--checkpoints-dir", str(folder / "out")]
        data = ["--train-dir", str(whole / "data" / "train"), "--valid-dir", str(whole / "data" / "test")]
        sizes = ["--vocab-size", "257", "--seq-length", "8", "--d-model", "8", "--num-layers", "1", "--num-heads", "1"]
        check([*argv, *data, *sizes], folder / "out")


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Draw a change: overwrite, cut or insert, most often in the header."""
    kind = draw(st.sampled_from(["overwrite", "cut", "insert", "remove"]))
    place = draw(st.one_of(st.integers(0, 200), st.integers(0, 10_000)))
    part = draw(
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, bytes(8), b"9", b"-", b"(", b"'"]))
    )

    def apply(contents: bytes) -> bytes:
        at = place % (len(contents) + 1)
        if kind == "cut":
            return contents[:at]
        end = {"overwrite": at + len(part), "insert": at, "remove": at + len(part)}[kind]
        return contents[:at] + (b"" if kind == "remove" else part) + contents[end:]

    return apply


def copy_linked(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, copy_function=os.link))


def rewrite(file: Path, contents: bytes) -> None:
    """Write the file without changing the other links to it."""
    file.unlink()
    file.write_bytes(contents)


@examples(14)
@given(change=damage(), has_manifest=st.booleans(), name=st.sampled_from(["x.npy", "train.bin"]))
def test_damaged_shards(whole: Path, change: Callable[[bytes], bytes], has_manifest: bool, name: str) -> None:
    with room() as folder:
        data = copy_linked(whole / "data", folder / "data")
        shard = min((data / "train").glob("*.npy"))
        contents = change(shard.read_bytes())
        if has_manifest:
            rewrite(shard, contents)
        else:
            shutil.rmtree(data / "train")
            (data / "train").mkdir()
            (data / "train" / name).write_bytes(contents)
        check(base(data, folder / "out"), folder / "out")


@st.composite
def change_of_json(draw: st.DrawFn) -> Callable[[Any], Any]:
    """Draw a change that replaces one value, possibly a nested one."""
    path = draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
    new = draw(st.one_of(JSON, st.just(...)))  # ... removes

    def apply(values: Any, path: list[int] = path) -> Any:
        if not path or not isinstance(values, dict | list) or not values:
            return None if new is ... else new
        keys = list(values) if isinstance(values, dict) else list(range(len(values)))
        key = keys[path[0] % len(keys)]
        copy = values.copy()
        if len(path) == 1 and new is ...:
            del copy[key]
        else:
            copy[key] = apply(values[key], path[1:])
        return copy

    return apply


def spoil(file: Path, by_value: Callable[[Any], Any] | None, by_byte: Callable[[bytes], bytes]) -> None:
    contents = file.read_bytes()
    rewrite(file, json.dumps(by_value(json.loads(contents))).encode() if by_value else by_byte(contents))


@examples(10)
@given(by_value=st.none() | change_of_json(), by_byte=damage())
def test_damaged_manifests(whole: Path, by_value: Callable | None, by_byte: Callable) -> None:
    with room() as folder:
        data = copy_linked(whole / "data", folder / "data")
        spoil(data / "train" / "manifest.json", by_value, by_byte)
        check(base(data, folder / "out"), folder / "out")


@examples(11)
@given(
    name=st.sampled_from(["config.json", "run_config.json", "COMPLETE", "model.safetensors", "training_state.pt"]),
    by_value=st.none() | change_of_json(),
    by_byte=damage(),
    how=st.sampled_from(["--resume", "--from-checkpoint", "--do-test"]),
)
def test_damaged_checkpoints(whole: Path, name: str, by_value: Callable | None, by_byte: Callable, how: str) -> None:
    with room() as folder:
        checkpoint = copy_linked(whole / "run" / "step-00000002", folder / "checkpoint")
        file = checkpoint / name
        spoil(file, by_value if file.suffix == ".json" or name == "COMPLETE" else None, by_byte)
        if name != "COMPLETE":
            entries = json.loads((checkpoint / "COMPLETE").read_text())
            entries["files"][name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            rewrite(checkpoint / "COMPLETE", json.dumps(entries).encode())
        source = ["--do-test", "--from-checkpoint"] if how == "--do-test" else [how]
        flags = [*source, str(checkpoint), "--train-steps", "3", "--checkpoints-dir", str(folder / "out")]
        check(flags, folder / "out")
