"""Preparing from the hub: the shards that the same files give from a folder, whatever the hub does meanwhile."""

import gzip
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run, succeed
from data.documents import documents, hashes
from data.hub_server import CLOSED, CUT, SLOW, Hub

CARD = """---
configs:
- config_name: plain
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/validation-*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# A data set
"""
SMALL_BLOCKS = "tests/workers/slow_prepare_worker.py"
TRAIN = ("data/train-0.parquet", "data/train-1.parquet")
SAMPLE = ("sample/10BT/000.jsonl", "sample/10BT/001.jsonl.gz", "sample/10BT/002.parquet")


def parquet(seed: int, count: int, padding: int = 0) -> bytes:
    """`padding`: bytes in a column beside the text's. The hub's library keeps what arrives 10 MiB at a time."""
    stream = io.BytesIO()
    table = pa.table(
        {"id": range(count), "text": documents(count, seed), "padding": [b"x" * (padding // count)] * count}
    )
    pq.write_table(table, stream, compression="none", use_dictionary=False)
    return stream.getvalue()


def lines(seed: int) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents(300, seed)).encode()


FILES = {
    "README.md": CARD.encode(),
    TRAIN[0]: parquet(1, 600, padding=24 << 20),
    TRAIN[1]: parquet(2, 600),
    "data/validation-0.parquet": parquet(3, 100),
    SAMPLE[0]: lines(4),
    SAMPLE[1]: gzip.compress(lines(5)),
    SAMPLE[2]: parquet(6, 200),
    "sample/100BT/000.parquet": parquet(7, 1),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with Hub("me/set", FILES) as hub:
        yield hub
        hub.shutdown()


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.behave()
    return server


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Hashes of what the files give from a folder."""
    folder = tmp_path_factory.mktemp("expected")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name, files in {"plain": TRAIN, "sample-10BT": SAMPLE}.items():
        inputs = [folder / file for file in files]
        flags = ["--input", *inputs, "--tokenizer", "bytes", "--output-dir", folder / "out" / name]
        succeed(run("scripts/prepare_fineweb.py", *flags, "--shard-size", 50_000))
    return {name: shards(folder / "out" / name) for name in ("plain", "sample-10BT")}


def shards(folder: Path) -> dict[str, str]:
    return {file: hash_ for file, hash_ in hashes(folder).items() if file != "preparation.json"}


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": ""}
    return {"PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)), **own}


def command(tmp_path: Path, *flags: object, script: str = "dataset") -> list[str]:
    """Into `out`, files in `cache`; later flags win."""
    (tmp_path / "cache").mkdir(exist_ok=True)
    folders = ["--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache"]
    common = [
        "--dataset",
        "me/set",
        "--config",
        "plain",
        "--tokenizer",
        "bytes",
        "--shard-size",
        50_000,
        "--retries",
        2,
    ]
    return [f"scripts/prepare_{script}.py", *map(str, [*common, *folders, *flags])]


def prepare(
    hub: Hub, tmp_path: Path, *flags: object, script: str = "dataset", **variables: str
) -> subprocess.CompletedProcess[str]:
    result = run(*command(tmp_path, *flags, script=script), **environment(hub, tmp_path) | variables)
    assert "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("\n") == (result.returncode != 0), "nothing but the error: " + result.stderr
    return result


def files_in(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_failures_change_nothing(
    streaming: bool, hub: Hub, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    hub.misbehave("HEAD", "main/README.md", [500])
    hub.misbehave("POST", f"paths-info/{hub.commit}", [503])
    hub.misbehave("GET", "elsewhere/" + TRAIN[0], [(429, {"Retry-After": "1"}), 503, CUT])
    hub.misbehave("HEAD", TRAIN[1], [429])
    hub.misbehave("GET", "elsewhere/" + TRAIN[1], [CLOSED])
    out = succeed(prepare(hub, tmp_path, "--streaming" if streaming else "--no-streaming"))
    assert shards(tmp_path / "out") == expected["plain"]
    assert f"--dataset me/set: 503 Service Unavailable for {hub.url}{hub.api}/paths-info/" in out
    assert f"{TRAIN[0]}: 503 Service Unavailable for {hub.elsewhere}/{TRAIN[0]}; trying again in 1 s" in out
    assert out.count("trying again in") == 2, "huggingface_hub makes the other requests again"
    assert hub.sent(TRAIN[0]) < 1.2 * len(FILES[TRAIN[0]]), "what has arrived is not sent again"
    assert hub.sent(TRAIN[1]) == len(FILES[TRAIN[1]])
    kept = files_in(tmp_path / "cache")
    assert kept == [] if streaming else all(any(file.endswith(name) for file in kept) for name in TRAIN)


def test_a_hub_that_stays_dead_and_comes_back_with_a_new_commit(
    hub: Hub, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    hub.misbehave("GET", "elsewhere/" + TRAIN[1], itertools.repeat(503))
    result = prepare(hub, tmp_path, "--retries", 1)
    assert result.returncode == 1
    why = f"{TRAIN[1]}: 503 Service Unavailable for {hub.elsewhere}/{TRAIN[1]}, 2 times; give the same command again"
    assert why in result.stderr
    hub.behave()
    hub.commit = hub.commit[::-1]
    succeed(prepare(hub, tmp_path))
    assert shards(tmp_path / "out") == expected["plain"]
    assert hub.sent(TRAIN[0]) == 0, "it is in the cache"
    assert "nothing to do" in succeed(prepare(hub, tmp_path))


def test_a_hub_that_is_dead_from_the_start(hub: Hub, tmp_path: Path) -> None:
    hub.misbehave("HEAD", "main/README.md", itertools.repeat(CLOSED))
    result = prepare(hub, tmp_path, "--retries", 1)
    assert result.returncode == 1
    assert "--dataset me/set: Server disconnected without sending a response for http://127.0.0.1" in result.stderr
    assert "main/README.md, 2 times; give the same command again once the hub answers" in result.stderr
    assert not (tmp_path / "out").exists()


def test_killed_within_the_second_file_it_ends_with_the_same_bytes(
    hub: Hub, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    hub.misbehave("GET", SAMPLE[1], [SLOW])
    flags = command(tmp_path, "--config", "sample-10BT", script="fineweb")
    worker, variables = [sys.executable, SMALL_BLOCKS, *flags[1:]], os.environ | environment(hub, tmp_path)
    with subprocess.Popen(
        worker, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        assert hub.paused.wait(60)
        process.send_signal(signal.SIGKILL)
    hub.behave()
    succeed(prepare(hub, tmp_path, "--config", "sample-10BT", script="fineweb"))
    assert shards(tmp_path / "out") == expected["sample-10BT"]


def test_files_named_by_the_card_alone(hub: Hub, expected: dict[str, dict[str, str]], tmp_path: Path) -> None:
    succeed(prepare(hub, tmp_path, "--config", "sample-10BT", "--streaming", script="fineweb"))
    assert shards(tmp_path / "out") == expected["sample-10BT"]
    assert files_in(tmp_path / "cache") == []


def test_a_split_becomes_test(hub: Hub, tmp_path: Path) -> None:
    out = succeed(prepare(hub, tmp_path, "--test-split", "validation"))
    assert f"{tmp_path / 'out' / 'train'}: " in out
    manifests = {
        split: json.loads((tmp_path / "out" / split / "manifest.json").read_text()) for split in ("train", "test")
    }
    assert [manifests[split]["documents"] for split in ("train", "test")] == [1200, 100]


@pytest.mark.parametrize("keeping", ["--streaming", "--no-streaming"])
def test_stopping_early_waits_for_no_file_and_leaves_none(keeping: str, hub: Hub, tmp_path: Path) -> None:
    hub.misbehave("GET", "elsewhere/" + TRAIN[1], [SLOW])
    flags = ["--max-tokens", 1000, "--test-fraction", 0.3, keeping]
    succeed(run(SMALL_BLOCKS, *command(tmp_path, *flags)[1:], **environment(hub, tmp_path)))
    assert hub.paused.is_set()
    assert not hub.resumed.is_set(), "nobody waits for a file that nobody reads"
    left = files_in(tmp_path / "cache")
    if keeping == "--streaming":
        assert left == []
    else:
        assert any(file.endswith(TRAIN[0]) for file in left)


WRONG = {
    "name": (["--dataset", "me/nope"], ["--dataset me/nope", "doesn't exist on the Hub or cannot be accessed"]),
    "config": (["--config", "nope"], ["'nope' not found", "['plain', 'sample-10BT']", "--config"]),
    "split": (["--split", "nope"], ["no split 'nope' but train, validation", "--split"]),
    "test split": (["--test-split", "nope"], ["no split 'nope' but train, validation"]),
    "column": (
        ["--text-column", "nope", "--streaming"],
        [f"error: me/set/{TRAIN[0]}: no column 'nope' but id, text, padding; text is in text, padding; choose with"],
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_named(mistake: str, hub: Hub, tmp_path: Path) -> None:
    flags, words = WRONG[mistake]
    result = prepare(hub, tmp_path, *flags)
    assert result.returncode == 2
    assert all(word in result.stderr for word in words), result.stderr
    assert not (tmp_path / "out").exists()
    assert files_in(tmp_path / "cache") == [] or mistake == "config"


def test_a_configuration_must_be_chosen_of_several(hub: Hub, tmp_path: Path) -> None:
    flags = " ".join(command(tmp_path)).replace(" --config plain", "").split()
    result = run(*flags, **environment(hub, tmp_path))
    assert result.returncode == 2
    assert "among the available configs: ['plain', 'sample-10BT']; check" in result.stderr


@pytest.mark.parametrize(("status", "told"), [(401, "401 Unauthorized for"), (404, "404 Not Found for")])
def test_a_file_that_may_not_be_had(status: int, told: str, hub: Hub, tmp_path: Path) -> None:
    hub.misbehave("HEAD", TRAIN[1], itertools.repeat(status))
    result = prepare(hub, tmp_path)
    assert result.returncode == 2
    assert f"me/set/{TRAIN[1]}: " in result.stderr
    assert told in result.stderr


def test_offline_it_says_so_at_once(hub: Hub, tmp_path: Path) -> None:
    result = prepare(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert "HF_HUB_OFFLINE" in result.stderr
    assert hub.requests == []
