"""Models from the hub are fetched once, however many processes ask, and every refusal is one line."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_RUN, run, run_xla, succeed, torchrun, training_losses
from data.hub_server import CLOSED, Hub
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2xla.checkpoint.formats import hugging_face as hf

NAME = "openai-community/gpt2"
TRAINING = ["--train-batch-size", "4", "--eval-batch-size", "4", "--gradient-accum-step", "1", "--valid-steps", "1"]
SHORT = [*TRAINING, "--train-steps", "2", "--warmup-steps", "0", "--decay-steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub holds as gpt2: a small model in two files with an index, beside files that are not needed."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=16, n_embd=128, n_layer=4, n_head=4)
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(folder, max_shard_size="2MB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) == 2
    (folder / "pytorch_model.bin").write_bytes(b"pickle" * 1000)
    (folder / "model.fp16.safetensors").write_bytes(b"?" * 1000)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Hub]:
    with Hub(NAME, {file.name: file.read_bytes() for file in folder.iterdir()}, kind="models") as hub:
        yield hub
        hub.shutdown()


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.behave()
    return server


def environment(url: str, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": ""}


def fetched_once(hub: Hub) -> bool:
    wanted = ("config.json", "generation_config.json", "model-", "model.safetensors.index.json")
    return all(
        hub.sent(f"/{name}") == (len(content) if name.startswith(wanted) else 0) for name, content in hub.files.items()
    )


def test_two_processes_at_once_fetch_each_file_once(hub: Hub, folder: Path, tmp_path: Path) -> None:
    program = """
import sys
from gpt2xla.checkpoint.loading import load_weights, locate
sys.stdin.readline()  # both at the same moment
folder = locate("gpt2")
config, weights = load_weights(folder)
print(folder, sum(tensor.double().sum().item() for tensor in weights.values()))
"""
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment(hub.url, tmp_path)
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=own, stdin=-1, stdout=-1, text=True) for _ in range(2)
    ]
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    first, second = (process.communicate(timeout=120)[0] for process in processes)
    assert first == second
    _, weights = hf.load_model(folder)
    assert float(first.split()[1]) == sum(tensor.double().sum().item() for tensor in weights.values())
    assert fetched_once(hub)


def test_a_url_of_the_hub_is_its_model(hub: Hub, folder: Path, tmp_path: Path) -> None:
    own = environment(hub.url, tmp_path) | {"HOME": str(tmp_path)}
    for number, sent in enumerate((1, 0)):  # the second time it is here
        hub.behave()
        output = tmp_path / f"converted-{number}"
        flags = ["--model", f"hf://{NAME}", "--output-dir", output]
        assert succeed(run("scripts/convert_checkpoint.py", *flags, **own)).startswith(f"hf://{NAME}: 4 layers")
        weights = [hf.load_model(source)[1] for source in (output, folder)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
        files = [name for name in hub.files if name.startswith("model-")]
        assert [hub.sent(f"/{name}") for name in files] == [sent * len(hub.files[name]) for name in files]
        assert hub.sent("/pytorch_model.bin") == hub.sent("/model.fp16.safetensors") == 0


@pytest.mark.slow
def test_two_processes_of_torchrun_fetch_once(hub: Hub, data_flags: list[str], tmp_path: Path) -> None:
    flags = [*data_flags, *SHORT, "--from-checkpoint", "gpt2", "--checkpoints-dir", tmp_path / "run"]
    succeed(torchrun(2, *flags, **environment(hub.url, tmp_path)))
    assert fetched_once(hub)


@pytest.mark.slow
def test_two_replicas_of_xla_fetch_once_and_equal_torch(hub: Hub, data_flags: list[str], tmp_path: Path) -> None:
    """Then torch uses the fetched files, offline."""
    flags = [*data_flags, *SHORT, "--from-checkpoint", "gpt2", "--dropout", "0", "--checkpoints-dir"]
    own = environment(hub.url, tmp_path)
    succeed(run_xla(*flags, tmp_path / "xla", CPU_NUM_DEVICES="2", **own))
    assert fetched_once(hub)
    succeed(run("run_pretrain.py", *flags, tmp_path / "torch", **own | {"HF_HUB_OFFLINE": "1"}))
    assert training_losses(tmp_path / "xla") == pytest.approx(training_losses(tmp_path / "torch"), rel=1e-5)


REFUSALS = {
    "gpt3": ["gpt3: no such folder or file", "the hub has no model gpt3", "path of a folder"],
    "me/none": ["the hub has no model me/none", "check the spelling"],
    "me/gated": ["is gated", "log in", "path of a folder"],
    "me/broken": ["status 500", "try again later", "path of a folder"],
    "me/closed": ["could not be downloaded", "check the network", "path of a folder"],
    "./no/such/folder": ["./no/such/folder: no such folder or file"],
}


def test_refusals_of_the_hub_are_one_line(hub: Hub, tmp_path: Path) -> None:
    faults = {"gated": (403, {"X-Error-Code": "GatedRepo"}), "broken": 500, "closed": CLOSED}
    for name, fault in faults.items():
        hub.misbehave("GET", f"/me/{name}/revision/main", itertools.repeat(fault))
    program = """
import sys
from gpt2xla.checkpoint.formats.hugging_face import find_folder
for name in sys.argv[1:]:
    try:
        find_folder(name)
    except ValueError as error:
        print(error)
"""
    own = environment(hub.url, tmp_path) | {"PYTHONPATH": str(ROOT)}
    lines = succeed(run("-c", program, *REFUSALS, **own)).splitlines()
    assert len(lines) == len(REFUSALS)
    for line, parts in zip(lines, REFUSALS.values(), strict=True):
        assert all(part in line for part in parts), line


@pytest.mark.parametrize("program", ["run_pretrain.py", pytest.param("run_pretrain_xla.py", marks=pytest.mark.slow)])
def test_without_a_network_one_line_names_the_fix(program: str, data_flags: list[str], tmp_path: Path) -> None:
    nowhere = environment("http://127.0.0.1:9", tmp_path)
    flags = [*data_flags, *SMALL_RUN, "--from-checkpoint", "gpt2-xl", "--checkpoints-dir", tmp_path / "run"]
    parts = ["gpt2-xl", NAME + "-xl", "the hub cannot be reached", "path of a folder that holds the model"]
    one_line(run(program, *flags, **nowhere) if "xla" not in program else run_xla(*flags, **nowhere), parts)
    parts[2] = "HF_HUB_OFFLINE is set; unset it"
    one_line(run("run_pretrain.py", *flags, **nowhere | {"HF_HUB_OFFLINE": "1"}), parts)


def one_line(result: subprocess.CompletedProcess[str], parts: list[str]) -> None:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert all(part in lines[0] for part in parts), lines[0]
