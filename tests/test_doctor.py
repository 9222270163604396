"""The doctor on machines built from what users reported, and on this one."""

import dataclasses
import os
from pathlib import Path

import pytest
from conftest import ROOT, require_xla, run, succeed
from packaging.requirements import Requirement

from gpt2xla import doctor
from gpt2xla.doctor import Machine, notes, probe, problems
from gpt2xla.errors import RunFailed
from gpt2xla.runtime.xla import environment as xla_environment
from gpt2xla.runtime.xla.versions import NEWEST, RELEASES

FITTING = {"torch": "2.9.0+cpu", "torch_xla": "2.9.0", "libtpu": "0.0.21", "jax": "0.7.1", "numpy": "2.3.1"}
TPU_VM = Machine(environment={"PJRT_DEVICE": "TPU"}, python=(3, 12), versions=FITTING, tpu_chips=8)


@pytest.fixture(autouse=True)
def eight_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_environment, "tpu_chips", lambda: ["TPU v5 lite"] * 8)


def changed(**changes: object) -> Machine:
    return dataclasses.replace(TPU_VM, **changes)  # type: ignore[arg-type]


def with_variables(**variables: str) -> Machine:
    return changed(environment={**TPU_VM.environment, **variables})


def with_versions(**versions: str) -> Machine:
    return changed(versions={**FITTING, **{name.replace("__", "-"): version for name, version in versions.items()}})


# What the hosts' TPU images of August 2026 bring, and what a bare machine gets.
IMAGES = {
    "TPU VM": FITTING,
    "TPU VM, installed now": dict(torch="2.9.0", torch_xla="2.9.0", libtpu="0.0.21.1", jax="0.7.2", jaxlib="0.7.2"),
    "Colab": dict(
        torch="2.9.0+cpu", torch_xla="2.9.0", libtpu="0.0.21.1", jax="0.7.2", jaxlib="0.7.2", numpy="2.1.3",
        transformers="5.15.0",
    ),
    "Kaggle": dict(torch="2.8.0+cpu", torch_xla="2.8.0", libtpu="0.0.17", jax="0.7.2", jaxlib="0.7.2", numpy="2.1.3"),
    "Kaggle, jax as new as the image": dict(torch="2.8.0+cpu", torch_xla="2.8.0", libtpu="0.0.17", jax="0.10.2"),
    "torch for CUDA": FITTING | {"torch": "2.9.1+cu128"},
}  # fmt: skip


@pytest.mark.parametrize("image", IMAGES)
def test_a_fitting_machine_has_no_problems(image: str) -> None:
    machine = changed(versions=IMAGES[image], python=(3, 13) if image == "Colab" else (3, 12))
    assert list(problems(machine)) == []
    slower = [line for line in notes(machine) if "flash attention" in line]
    assert slower == list(notes(machine))
    assert len(slower) == ("Kaggle" in image), "the libtpu of torch_xla 2.8 does not compile the kernels"


def test_without_jax_training_is_slower() -> None:
    machine = changed(versions={name: version for name, version in FITTING.items() if name != "jax"})
    assert list(problems(machine)) == []
    (note,) = notes(machine)
    assert note.endswith("pip install jax==0.7.2")


# A machine -> what its one line must hold: the culprit, then the fix.
PROBLEMS = {
    "torch newer": (with_versions(torch="2.10.0"), ["torch 2.10.0", "torch_xla 2.9.0", "pip install torch==2.9.0"]),
    "torch older": (
        with_versions(torch="2.8.0", libtpu="0.0.17"), ["torch 2.8.0", "torch_xla 2.9.0", "pip install torch_xla==2.8.0"],
    ),
    "both older": (
        with_versions(torch="2.6.0", torch_xla="2.6.0"),
        ["torch 2.6.0 and torch_xla 2.6.0", "pip install torch==2.9.0 torch_xla==2.9.0"],
    ),
    "both newer": (with_versions(torch="2.11.0", torch_xla="2.11.0"), ["torch_xla 2.11.0", "torch_xla==2.9.0"]),
    "no torch": (changed(versions={"torch_xla": "2.8.1", "libtpu": "0.0.17"}), ["torch is not", "install torch==2.8.0"]),
    "no torch_xla": (changed(versions={"torch": "2.9.0", "libtpu": "0.0.21"}), ["torch_xla is not", "torch_xla==2.9.0"]),
    "no torch_xla for torch 2.8": (
        changed(versions={"torch": "2.8.0+cpu", "libtpu": "0.0.17"}), ["torch_xla is not", "torch_xla==2.8.0"],
    ),
    "libtpu newer": (with_versions(libtpu="0.0.25"), ["libtpu 0.0.25", "pip install libtpu==0.0.21.1"]),
    "libtpu of the other": (with_versions(libtpu="0.0.17"), ["libtpu 0.0.17", "pip install libtpu==0.0.21.1"]),
    "libtpu too new for 2.8": (
        changed(versions=IMAGES["Kaggle"] | {"libtpu": "0.0.21.1"}), ["libtpu 0.0.21.1", "pip install libtpu==0.0.17"],
    ),
    "libtpu alike": (with_versions(libtpu="0.0.210"), ["libtpu 0.0.210", "pip install libtpu==0.0.21.1"]),
    "no libtpu": (changed(versions={"torch": "2.9.0", "torch_xla": "2.9.0"}), ["libtpu is not", "libtpu==0.0.21.1"]),
    "two libtpus": (with_versions(libtpu__nightly="0.1.dev20241008"), ["libtpu-nightly", "pip uninstall -y"]),
    "jax newer": (with_versions(jax="0.8.0"), ["jax 0.8.0", "pip install jax==0.7.2"]),
    "tensorflow": (with_versions(tensorflow="2.18.0"), ["tensorflow takes the TPU", "pip uninstall -y tensorflow"]),
    "tensorflow-tpu": (with_versions(tensorflow__tpu="2.18.0"), ["tensorflow-tpu takes", "uninstall -y tensorflow-tpu"]),
    "old numpy": (with_versions(numpy="1.9.5"), ["numpy 1.9.5", "pip install 'numpy>=1.26'"]),
    "old python": (changed(python=(3, 9)), ["Python 3.9", "3.10 to 3.13"]),
    "no device named": (changed(environment={}), ["PJRT_DEVICE is not set", "PJRT_DEVICE=TPU"]),
    "unknown device": (changed(environment={"PJRT_DEVICE": "tpu"}), ["PJRT_DEVICE=tpu", "choose TPU"]),
    "replicas": (changed(environment={"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "x"}), ["CPU_NUM_DEVICES=x", "such as 2"]),
    "addresses": (with_variables(TPU_PROCESS_ADDRESSES="local"), ["TPU_PROCESS_ADDRESSES", "unset TPU_PROCESS"]),
    "task id": (with_variables(CLOUD_TPU_TASK_ID="0"), ["CLOUD_TPU_TASK_ID", "unset CLOUD_TPU_TASK_ID"]),
    "XRT": (with_variables(XRT_TPU_CONFIG="localservice;0;localhost:51011"), ["XRT_TPU_CONFIG", "unset XRT_TPU_CONFIG"]),
    "all in bf16": (with_variables(XLA_USE_BF16="1"), ["XLA_USE_BF16", "unset XLA_USE_BF16"]),
    "preload": (with_variables(LD_PRELOAD="libc.so.6:/no/tcmalloc.so"), ["/no/tcmalloc.so", "unset LD_PRELOAD"]),
    "library": (with_variables(TPU_LIBRARY_PATH="/no/libtpu.so"), ["/no/libtpu.so", "unset TPU_LIBRARY_PATH"]),
    "held": (changed(holders=["python3 (pid 7)"], lockfile=True), ["python3 (pid 7)", "end it"]),
    "lock file": (changed(lockfile=True, device_files=["/dev/accel0"]), ["sudo rm /tmp/libtpu_lockfile"]),
    "full disk": (changed(free_disk=10**9), ["--checkpoints-dir has 1.0 GB", "124M"]),
    "read-only": (changed(free_disk=None), ["--checkpoints-dir", "choose another"]),
    "little memory": (changed(free_memory=10**9), ["1.0 GB of memory", "larger machine"]),
}  # fmt: skip


@pytest.mark.parametrize(("machine", "words"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_problem_is_one_line_with_its_fix(machine: Machine, words: list[str]) -> None:
    (line,) = problems(machine)
    assert "\n" not in line
    positions = [line.find(word) for word in words]
    assert -1 not in positions, line


@pytest.mark.parametrize("image", IMAGES)
def test_pip_keeps_what_a_host_brings(image: str) -> None:
    """Of the packages that must fit together; `<=2.9.0` allows 2.9.0+cpu, as pip reads it."""
    extras = _extras()
    for name, version in IMAGES[image].items():
        if (name, version) == ("torch", "2.9.1+cu128") or (name[:3] == "jax" and version[:3] != "0.7"):
            continue
        for requirement in [*extras["core"], *extras["xla"], *extras["tpu-check"]]:
            assert requirement.name != name or requirement.specifier.contains(version), requirement


def test_a_bare_machine_gets_the_newest_release() -> None:
    """pip takes the last that the ranges allow, whatever comes out later."""
    extras = _extras()
    allowed = {requirement.name: requirement.specifier for requirement in [*extras["xla"], *extras["tpu-check"]]}
    for name, wanted in NEWEST.pins.items():
        later = {"2.9.0": ["2.9.1", "2.10.0"], "0.0.21.1": ["0.0.22", "0.0.52"], "0.7.2": ["0.8.0", "0.10.2"]}[wanted]
        assert list(allowed[name].filter([*(release.pins.get(name, wanted) for release in RELEASES), *later])) == [
            release.pins.get(name, wanted) for release in RELEASES
        ]
    for unknown in ("0.0.18", "0.0.19", "0.0.19.1", "0.0.20"):
        assert unknown not in allowed["libtpu"]


def _extras() -> dict[str, list[Requirement]]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(text) for text in texts] for extra, texts in lists.items()}


def test_a_missing_tpu_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_environment, "tpu_chips", list)
    (line,) = problems(changed(tpu_chips=0))
    assert "no TPU" in line


def test_what_the_runner_fixes_on_kaggle_is_a_note() -> None:
    machine = with_variables(KAGGLE_KERNEL_RUN_TYPE="Batch", TPU_PROCESS_ADDRESSES="local", CLOUD_TPU_TASK_ID="0")
    assert list(problems(machine)) == []
    assert [line.split(";")[0] for line in notes(machine)] == [
        "Kaggle sets TPU_PROCESS_ADDRESSES", "Kaggle sets CLOUD_TPU_TASK_ID",
    ]  # fmt: skip


def test_tensorflow_disturbs_only_tpus() -> None:
    machine = dataclasses.replace(with_versions(tensorflow="2.18.0"), environment={"PJRT_DEVICE": "CPU"}, tpu_chips=0)
    assert list(problems(machine)) == []


# What the runtime said in users' reports -> the fix that must follow.
MESSAGES = {
    "ImportError: _XLAC.so: undefined symbol: _ZN2at6native": "do not fit together",
    "F0000 Mismatched PJRT plugin PJRT API version (0.47) and framework PJRT API version 0.40": "libtpu is of another",
    "RuntimeError: TPU initialization failed: open(/dev/accel0): Operation not permitted": "another process holds",
    "RuntimeError: Invalid --2a886c8_slice_builder_worker_addresses specified. Expected 4 worker addresses, got 1": (
        "unset TPU_PROCESS_ADDRESSES and CLOUD_TPU_TASK_ID"
    ),
    "F xla/parse_flags_from_env.cc:234] Unknown flag in XLA_FLAGS: --nonsense": "correct it, or unset XLA_FLAGS",
    "E tsl/util/command_line_flags.cc:109] Couldn't interpret value maybe for flag xla_x\nusage: of XLA_FLAGS\n  an Error": (
        "correct that flag in XLA_FLAGS"
    ),
    "requests.exceptions.ConnectionError: HTTPConnectionPool(host='metadata.google.internal')": "no TPU metadata",
}


@pytest.mark.parametrize(("message", "fix"), MESSAGES.items(), ids=range(len(MESSAGES)))
def test_a_failing_runtime_is_explained(message: str, fix: str) -> None:
    with pytest.raises(RunFailed, match=fix) as failure:
        probe(os.environ, 60, program=f"raise SystemExit({message!r})")
    assert message[:60] in str(failure.value)


def test_an_unknown_failure_shows_all_it_said(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunFailed, match=r"ValueError: new") as failure:
        probe(os.environ, 60, program="raise ValueError('new')")
    assert "exit code 1" in str(failure.value)
    assert "Traceback" in capfd.readouterr().err


def test_a_hanging_runtime_is_given_up() -> None:
    with pytest.raises(RunFailed, match=r"no answer from the devices within 0\.5 s"):
        probe(os.environ, 0.5, program="import time; time.sleep(60)")


def test_a_process_that_has_the_device_open_is_named(tmp_path: Path) -> None:
    device = tmp_path / "accel0"
    with device.open("w"):
        assert any(f"(pid {os.getpid()})" in holder for holder in doctor._holders([str(device)]))
    assert doctor._holders([str(device)]) == []


def test_looking_at_a_machine_loads_no_runtime() -> None:
    program = """
import sys
from pathlib import Path
from gpt2xla.doctor import Machine
Machine.here(Path("checkpoints"))
assert not any(name.startswith(("torch", "jax")) for name in sys.modules)
"""
    succeed(run("-c", program))


def test_here_all_is_well_and_without_a_device_it_is_not(tmp_path: Path) -> None:
    require_xla()
    well = run("-m", "gpt2xla.doctor", "--checkpoints-dir", tmp_path, PJRT_DEVICE="CPU")
    assert well.returncode == 0, well.stdout + well.stderr
    assert "1 of type CPU" in well.stdout
    assert "no problems found" in well.stdout
    for name in ("Python", "torch ", "torch_xla", "numpy", "transformers"):
        assert f"\n  {name}" in well.stdout
    url = run("-m", "gpt2xla.doctor", "--checkpoints-dir", "gs://bucket/run")
    assert url.returncode == 2
    assert "--checkpoints-dir gs://bucket/run: is examined as --bucket gs://bucket/run" in url.stderr
    ill = run("-m", "gpt2xla.doctor", "--checkpoints-dir", tmp_path, PJRT_DEVICE="", XRT_TPU_CONFIG="x")
    assert ill.returncode == 1
    assert ill.stdout.count("problem: ") == 2
    assert "2 problems found; each line ends with the fix" in ill.stderr
    assert run("-m", "gpt2xla.doctor", "--no-such-flag").returncode == 2
