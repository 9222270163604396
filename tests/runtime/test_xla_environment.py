"""What is fixed before torch_xla is imported, in environments as users have them."""

from pathlib import Path

import pytest
from conftest import SMALL_RUN, require_xla, run

from gpt2xla.errors import InputError
from gpt2xla.runtime.xla import environment as xla_environment
from gpt2xla.runtime.xla.environment import gpus, prepare, shown, tpu_chips

# As a Kaggle notebook with a TPU v5e-8 has it, as far as torch_xla reads it.
KAGGLE = {
    "KAGGLE_KERNEL_RUN_TYPE": "Interactive", "PJRT_DEVICE": "TPU", "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-8", "TPU_CHIPS_PER_HOST_BOUNDS": "2,4,1", "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_PROCESS_ADDRESSES": "local", "CLOUD_TPU_TASK_ID": "0",
}  # fmt: skip


@pytest.fixture
def with_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_environment, "tpu_chips", lambda: ["TPU v2"] * 8)  # a kind without compiler flags


@pytest.mark.usefixtures("with_chips")
@pytest.mark.parametrize("host", ["KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"])
def test_on_kaggle_and_colab_two_variables_go_and_no_others(host: str) -> None:
    environment = {host if name == "KAGGLE_KERNEL_RUN_TYPE" else name: value for name, value in KAGGLE.items()}
    before = dict(environment)
    prepare(environment)
    assert before.keys() - environment.keys() == {"TPU_PROCESS_ADDRESSES", "CLOUD_TPU_TASK_ID"}
    assert environment.items() <= before.items()
    prepare(environment)  # where they are not set there is nothing to do


@pytest.mark.usefixtures("with_chips")
def test_elsewhere_nothing_changes() -> None:
    environment = {name: value for name, value in KAGGLE.items() if not name.startswith("KAGGLE")}
    before = dict(environment)
    prepare(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("device", "message"),
    [("", "PJRT_DEVICE is not set; put PJRT_DEVICE=TPU"), ("tpu", "PJRT_DEVICE=tpu: unknown"), ("TPU", "has no TPU")],
)
def test_a_wrong_device_is_one_clear_line(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_environment, "tpu_chips", list)
    with pytest.raises(InputError, match=message):
        prepare({"PJRT_DEVICE": device})


def test_cuda_becomes_gpu_where_plugin_and_gpu_are(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"PJRT_DEVICE": "CUDA"}
    monkeypatch.setattr(xla_environment, "_is_installed", lambda module: False)
    with pytest.raises(InputError, match=r"requirements-xla_cuda\.txt"):
        prepare(environment)
    monkeypatch.setattr(xla_environment, "_is_installed", lambda module: True)
    monkeypatch.setattr(xla_environment, "gpus", lambda environment: 0)
    with pytest.raises(InputError, match="PJRT_DEVICE=CUDA: no NVIDIA driver or no GPU"):
        prepare(environment)
    monkeypatch.setattr(xla_environment, "gpus", lambda environment: 2)
    prepare(environment)
    assert environment == {"PJRT_DEVICE": "GPU"}
    for wrong in ("3", "0", "all"):
        with pytest.raises(InputError, match=f"GPU_NUM_DEVICES={wrong}: there are 2 GPUs"):
            prepare({"PJRT_DEVICE": "CUDA", "GPU_NUM_DEVICES": wrong})
    prepare({"PJRT_DEVICE": "CUDA", "GPU_NUM_DEVICES": "2"})


def test_tpu_chips_are_counted_and_googles_network_cards_are_not(tmp_path: Path) -> None:
    for number, (vendor, device) in enumerate(
        [("0x1ae0", "0x0063")] * 7 + [("0x1ae0", "0x0042"), ("0x10de", "0x0063"), ("0x1ae0", "0x0062")]
    ):
        folder = tmp_path / f"0000:00:{number:02x}.0"
        folder.mkdir()
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(device + "\n")
    assert tpu_chips(tmp_path) == ["TPU v5 lite"] * 7 + ["TPU v5"]
    assert tpu_chips(tmp_path / "nowhere") == []


@pytest.mark.parametrize(("subsystem", "kind"), [("0x004e", "TPU v2"), ("0x004f", "TPU v3"), (None, "TPU v3")])
def test_v2_and_v3_differ_in_their_subsystem(subsystem: str | None, kind: str, tmp_path: Path) -> None:
    for name, number in {"vendor": "0x1ae0", "device": "0x0027", "subsystem_device": subsystem}.items():
        if number:
            (tmp_path / "chip").mkdir(exist_ok=True)
            (tmp_path / "chip" / name).write_text(f"{number}\n")
    assert tpu_chips(tmp_path) == [kind]


def test_counting_gpus_needs_no_driver() -> None:
    assert gpus({}) >= 0
    assert gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0


@pytest.mark.parametrize(("visible", "left"), [(None, 4), ("0,1", 2), ("3", 1), ("", 0), ("-1", 0), ("0,-1,2", 1)])
def test_hidden_gpus_do_not_count(visible: str | None, left: int) -> None:
    assert shown(4, visible) == left


def test_a_kernel_that_uses_the_device_already_gets_an_error(data_flags: list[str], tmp_path: Path) -> None:
    require_xla()
    flags = [*data_flags, *SMALL_RUN, "--mp-start-method", "fork", "--checkpoints-dir", str(tmp_path)]
    program = f"""
import torch, torch_xla
torch.zeros(1, device="xla")
from gpt2xla.processes.exits import exit_code
from run_pretrain_xla import main
raise SystemExit(exit_code(lambda: main({flags!r})))
"""
    result = run("-c", program, PJRT_DEVICE="CPU")
    assert result.returncode == 2, result.stderr
    assert "restart the notebook's kernel" in result.stderr
