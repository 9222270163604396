"""Which compute type --mixed-precision auto takes on which device, what is refused, and what a continued run keeps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN, run_here, succeed

from gpt2xla.checkpoint.start import find_start
from gpt2xla.cli import parse_run
from gpt2xla.config import TorchConfig, XlaConfig
from gpt2xla.errors import InputError
from gpt2xla.evals.options import EvalConfig
from gpt2xla.runtime.precision import DevicePrecision, choose, label, of_xla
from gpt2xla.runtime.torch.accelerators import Cpu, Cuda, Mps

# A card -> its compute capability, and what auto takes.
CARDS = {
    "NVIDIA H100 80GB HBM3": ((9, 0), "bf16"),
    "NVIDIA A100-SXM4-40GB": ((8, 0), "bf16"),
    "NVIDIA GeForce RTX 3060": ((8, 6), "bf16"),
    "NVIDIA B200": ((10, 0), "bf16"),
    "Tesla T4": ((7, 5), "fp16"),
    "Tesla V100-SXM2-16GB": ((7, 0), "fp16"),
    "Tesla P100-PCIE-16GB": ((6, 0), "fp16"),
    "NVIDIA GeForce GTX 1080 Ti": ((6, 1), "none"),
    "Tesla M60": ((5, 2), "none"),
}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., DevicePrecision]:
    """Makes torch see a card."""

    def see(name: str, capability: tuple[int, int], hip: str | None = None) -> DevicePrecision:
        def has_bf16(including_emulation: bool = True) -> bool:
            return including_emulation or hip is not None or capability >= (8, 0)

        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", has_bf16)
        return Cuda(0).precision()

    return see


@pytest.mark.parametrize(("name", "capability", "auto"), [(n, *c) for n, c in CARDS.items()], ids=CARDS)
def test_a_card_gets_the_type_that_it_has(
    cuda: Callable[..., DevicePrecision], name: str, capability: tuple[int, int], auto: str
) -> None:
    on_xla = of_xla(name, f"{capability[0]}.{capability[1]}")
    for there in (cuda(name, capability), on_xla):
        chosen = choose("auto", there)
        assert chosen.name == auto
        assert chosen.note.startswith(f"auto: {name} has")
        assert choose("none", there).name == "none"
        assert ("--mixed-precision" in choose("none", there).note) == (auto != "none")
        assert choose("fp16", there) == ("fp16", "")
        if auto == "bf16":
            assert choose("bf16", there) == ("bf16", "")
        else:
            with pytest.raises(InputError, match=f"--mixed-precision bf16: {name} has no bf16.*; use.*{auto}$"):
                choose("bf16", there)


def test_other_devices(cuda: Callable[..., DevicePrecision], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda("AMD Instinct MI250X", (9, 0), hip="6.4").auto == "bf16"
    assert Mps().precision().auto == "none"
    assert [of_xla(kind, None).auto for kind in ("TPU v2", "TPU v3", "TPU v5 lite", "TPU", "cpu")] == ["bf16"] * 4 + [
        "none"
    ]
    assert of_xla("AMD Instinct MI250X", "gfx90a").auto == "bf16"
    for has, note in ((True, "; --mixed-precision bf16 is usually faster here"), (False, "")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        chosen = choose("auto", Cpu().precision())
        assert chosen == ("none", f"auto: a CPU is trained in fp32{note}")
        assert chosen.dtype == torch.float32
        assert label(chosen.name) == "fp32"


@pytest.mark.parametrize("runtime", [TorchConfig, XlaConfig])
def test_words_for_fp32(runtime: type) -> None:
    for word in ("none", "fp32", "no", "off"):
        assert parse_run(runtime, ["--mixed-precision", word])[0].train.mixed_precision == "none"
    assert parse_run(runtime, [])[0].train.mixed_precision == "auto"
    assert EvalConfig().train_config().mixed_precision == "none", "tables compare"


def run_config(folder: Path) -> dict:
    return json.loads((folder / "run_config.json").read_text())


def test_a_run_stores_what_was_chosen_and_keeps_it(data_flags: list[str], tmp_path: Path) -> None:
    flags = [*data_flags, *SMALL_RUN, "--save-interval", 1, "--checkpoints-dir", tmp_path]
    text = succeed(run_here("run_pretrain.py", *flags, "--train-steps", 1))
    assert "precision: fp32, matmul highest (auto: a CPU is trained in fp32" in text
    for folder in (tmp_path, tmp_path / "step-00000001"):
        assert run_config(folder)["mixed_precision"] == "none"
    text = succeed(run_here("run_pretrain.py", *flags, "--train-steps", 2, "--mixed-precision", "bf16"))
    assert "changed: --mixed-precision none -> bf16" in text
    assert "precision: bf16, matmul" in text
    for asked in ([], ["--mixed-precision", "auto"]):
        continued = find_start(parse_run(TorchConfig, [str(word) for word in [*flags, *asked]])[0])
        assert continued.config.train.mixed_precision == "bf16"
        assert not any("--mixed-precision" in note for note in continued.notes)


def test_a_run_from_before_the_words_stays_in_fp32(trained: Path, data_flags: list[str], tmp_path: Path) -> None:
    old = run_config(trained) | {"mixed_precision": None, "activation": "gelu"}
    file = tmp_path / "run_config.json"
    file.write_text(json.dumps(old))
    config, _ = parse_run(TorchConfig, ["--config", str(file)])
    assert (config.train.mixed_precision, config.model.activation) == ("none", "gelu-exact")
    file.write_text("activation: gelu\nmixed_precision: null\n")
    config, _ = parse_run(TorchConfig, ["--config", str(file)])
    assert (config.train.mixed_precision, config.model.activation) == ("auto", "gelu-tanh")


def test_a_test_is_in_fp32_unless_its_run_was_not(trained: Path, tmp_path: Path) -> None:
    def precision(*flags: object) -> str:
        words = ["--do-test", "--checkpoints-dir", tmp_path, *flags]
        return find_start(parse_run(TorchConfig, list(map(str, words)))[0]).config.train.mixed_precision

    step = trained / "step-00000020"
    assert precision("--from-checkpoint", step) == "none"
    assert precision("--from-checkpoint", step, "--mixed-precision", "bf16") == "bf16"
    assert precision("--from-checkpoint", step, "--resume", "never") == "none"
    assert precision("--from-checkpoint", step, "--resume", "never", "--mixed-precision", "auto") == "auto"
