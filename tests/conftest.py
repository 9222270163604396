"""Shared by all tests: a small data set on disk, and running the programs as a user does."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from warm import run_warm

if TYPE_CHECKING:
    from gpt2xla.data.preparation.rows import Sample

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 97
SECONDS = 500  # for a program, on a busy machine

# What GPT-2's own encoding needs; the tests that use it are skipped by name where it is neither here nor cached.
if "TIKTOKEN_CACHE_DIR" not in os.environ and (ROOT.parent / "shared" / "tiktoken").is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(ROOT.parent / "shared" / "tiktoken")
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
# Of the tests themselves, too, before they import torch: models this small are no faster with more threads, and much slower
# where other processes want the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# XLA as ever, but LLVM makes its machine code quickly instead of well: that was half of a run on XLA in these sizes.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

# A job in the background of a script ignores Ctrl-C, and so would the programs that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A model small enough to compile in seconds, with accumulation, clipping, validation and saving.
SMALL_RUN = [
    "--vocab-size", "97", "--seq-length", "16", "--d-model", "32", "--num-layers", "2", "--num-heads", "2",
    "--train-batch-size", "4", "--gradient-accum-step", "3", "--eval-batch-size", "4", "--valid-steps", "3",
    "--learning-rate", "0.01", "--min-lr", "0.001", "--warmup-steps", "0", "--decay-steps", "20", "--max-grad-norm", "0.5",
    "--train-steps", "20", "--valid-interval", "10", "--save-interval", "10",
]  # fmt: skip


def run(program: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the repository from its root, as the README's commands do. It may be `-m gpt2xla COMMAND`."""
    words = [*program.split(), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    kind = "xla" if "PJRT_DEVICE" in environment else "torch"
    return run_warm(kind, words, ROOT, environment, SECONDS) or subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )  # fmt: skip


def run_here(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """As `run`, but in this process, which has imported what takes a program's first seconds: for mistakes and short runs
    that leave nothing behind in it."""
    words, folder, arguments_here = [program, *map(str, arguments)], Path.cwd(), sys.argv
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        os.chdir(ROOT)
        sys.argv = words
        try:
            runpy.run_path(program, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            os.chdir(folder)
            sys.argv = arguments_here
    return subprocess.CompletedProcess(words, code, output.getvalue(), errors.getvalue())


def told(result: subprocess.CompletedProcess[str], text: str) -> int:
    """In how many lines of their own the processes report an error with `text`. torchrun repeats it in its report."""
    starts = ("run_pretrain", "gpt2xla")
    return sum(text in line for line in result.stderr.splitlines() if line.startswith(starts) and ": error: " in line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests of minutes come first, so that no worker has one left when the others are done."""
    items.sort(key=lambda item: item.path.name not in ("test_readme.py", "test_smoke.py", "test_notebooks.py"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for other processes most of the time."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` not only a file's tests stay together: all of the playground share a server and a browser."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder = "tests/playground/"
            return folder if nodeid.startswith(folder) else super()._split_scope(nodeid)

    return Together(config, log)


def require_xla() -> None:
    if importlib.util.find_spec("torch_xla") is None:
        pytest.skip("needs torch_xla: pip install -e '.[xla]'")


def run_xla(
    *arguments: object, program: str = "run_pretrain_xla.py", **environment: str
) -> subprocess.CompletedProcess[str]:
    require_xla()
    if program == "run_pretrain_xla.py":  # its workers need not import all again
        arguments = ("--mp-start-method", "fork", *arguments)
    return run(program, *arguments, PJRT_DEVICE="CPU", **environment)


def torchrun(
    processes: int, *arguments: object, program: str = "run_pretrain.py", **environment: str
) -> subprocess.CompletedProcess[str]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *program.split()]
    return run("-m", *launcher, *arguments, **environment)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(happened: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.1)


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def training_losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def write_split(folder: Path, tokens: np.ndarray, shards: int = 3) -> None:
    folder.mkdir(parents=True)
    for number, part in enumerate(np.array_split(tokens.astype(np.uint16), shards)):
        np.save(folder / f"{number:03d}.npy", part)


def prepare_documents(folder: Path) -> Path:
    """`folder` with train/ and test/ of 60 documents in bytes, in shards of 2,000 tokens."""
    from gpt2xla.data.documents.corpus import local_parts
    from gpt2xla.data.preparation.pipeline import PrepareConfig, prepare
    from gpt2xla.data.tokenizer import load_tokenizer

    text = folder.with_name(f"{folder.name}.txt")
    text.write_text("\n".join(f"document {i} " * 20 for i in range(60)))
    config = PrepareConfig(output_dir=str(folder), seed=0, test_fraction=0.2, shard_size=2000)
    prepare(local_parts([text], split_by="line"), load_tokenizer("bytes"), config)
    return folder


def random_samples(count: int, longest: int, seed: int, vocab_size: int = VOCAB_SIZE) -> list[Sample]:
    """Samples of 2 to `longest` tokens without an end-of-text, in which spans are trained on, as answers are."""
    from gpt2xla.data.preparation.rows import Sample

    rng, samples = np.random.default_rng(seed), []
    for _ in range(count):
        length = int(rng.integers(2, longest + 1))
        ids = (rng.integers(0, vocab_size) + np.cumsum(rng.random(length) < 0.8)) % vocab_size
        border = int(rng.integers(1, length))
        trained = np.arange(length) >= border
        trained[: border // 2] = rng.random() < 0.3  # an earlier turn
        samples.append(Sample(ids.astype(np.uint16), trained, length))
    return samples


def learnable_tokens(count: int, seed: int) -> np.ndarray:
    """Tokens in which each mostly follows from the one before, so that a loss can fall."""
    rng = np.random.default_rng(seed)
    jumps = np.where(rng.random(count) < 0.8, 1, rng.integers(0, VOCAB_SIZE, count))
    return np.cumsum(jumps) % VOCAB_SIZE


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and test/: plain .npy shards, 5,000 and 500 tokens, ids below 97."""
    folder = tmp_path_factory.mktemp("data")
    write_split(folder / "train", learnable_tokens(5000, seed=1))
    write_split(folder / "test", learnable_tokens(500, seed=2), shards=2)
    return folder


@pytest.fixture(scope="session")
def data_flags(data: Path) -> list[str]:
    return ["--train-dir", str(data / "train"), "--valid-dir", str(data / "test")]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    """The checkpoints folder of a finished small run on the torch runtime, with checkpoints at steps 10 and 20."""
    folder = tmp_path_factory.mktemp("trained")
    succeed(run("run_pretrain.py", *data_flags, *SMALL_RUN, "--checkpoints-dir", folder))
    return folder


@pytest.fixture(scope="session")
def gpt2_encoding() -> str:
    import tiktoken

    try:
        tiktoken.get_encoding("gpt2")
    except OSError:
        pytest.skip("needs GPT-2's encoding: go online, or set TIKTOKEN_CACHE_DIR to a folder that holds it")
    return "gpt2"
