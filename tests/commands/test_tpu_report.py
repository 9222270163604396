"""scripts/tpu_report.py: what it prints for runs that go well, go wrong, or do not end. A program in the place of its runs
answers as they would on a TPU; the last tests run ours on XLA:CPU."""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import require_xla

from gpt2xla.commands import tpu_report
from gpt2xla.config import TorchConfig
from gpt2xla.errors import InputError, RunFailed
from gpt2xla.runtime.xla.versions import installed
from gpt2xla.tpu_check import curve

# Answers as a run on eight v5e chips, with updates of 0.3 s; MODE says what goes wrong.
FAKE = """
import json, os, sys, time
from pathlib import Path
facts_file, mode = Path(sys.argv[1]), os.environ["MODE"]
config = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
kind = "flash" if config["attention"] == "auto" and mode != "no flash" else "chunked"
facts = {
    "type": "TPU", "kind": "TPU v5 lite", "devices": 8, "precision": "bf16", "flags": {"LIBTPU_INIT_ARGS": "--a=b"},
    "kernels": f"{kind} attention, loss in 4 pieces", "flops_per_token": 855_000_000, "peak_flops": 8 * 197e12,
    "compile_seconds": [61.5, 20.25],
    "memory": {"bytes_used": 1, "peak_bytes_used": 8 * 2**30, "bytes_limit": 15.75 * 2**30},
}
facts_file.write_text(json.dumps(facts))
if mode == "crash" and kind == "flash":
    sys.exit("measured_run.py: error: the kernel is not to be compiled")
curve = json.loads(Path(os.environ["CURVE"]).read_text())
folder = Path(config["checkpoints_dir"])
folder.mkdir()
wrong = mode == "wrong" and kind == "flash"
tokens = config["train_batch_size"] * config["seq_length"]
with (folder / "metrics.jsonl").open("w") as file:
    for i in range(config["train_steps"]):
        line = {"step": i + 1, "tokens": (i + 1) * tokens, "loss": curve["losses"][i] + 0.1 * wrong, "trace_ms": 30.0 + i,
                "grad_norm": curve["grad_norms"][i], "time": 1e9 + 0.3 * i + 60 * (i > 0)}
        print(json.dumps(line), file=file, flush=True)
print("updates are done", flush=True)
if mode == "hang":
    time.sleep(600)
"""


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Runs the program with a mode of FAKE, and returns what it prints to paste, its numbers, and its error."""
    program = tmp_path / "fake.py"
    program.write_text(FAKE)
    (temporary := tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tpu_report, "PROGRAM", (sys.executable, str(program)))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(tpu_report, "_SECONDS_TO_END", 1)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # its handler would stay
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setenv("CURVE", str(Path(tpu_report.__file__).parents[1] / "tpu_check" / "curve.json"))
    if "torch_xla" not in installed(["torch_xla"]):
        monkeypatch.setattr(tpu_report, "misfits", lambda *_, **__: [])

    def run(mode: str, *flags: str) -> tuple[str, dict, BaseException | None]:
        monkeypatch.setenv("MODE", mode)
        file = tmp_path / "report.json"
        monkeypatch.setattr(sys, "argv", ["tpu_report.py", "--steps", "6", "--json", str(file), *flags])
        error: BaseException | None = None
        try:
            tpu_report.main()
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        assert not list(temporary.iterdir()), "nothing is left behind"
        text = capsys.readouterr().out
        assert text.strip().endswith("```")
        assert max(map(len, text.splitlines())) <= 130
        return text[text.index("```text") :], json.loads(file.read_text()), error

    return run


def test_what_a_good_run_reports(report) -> None:
    text, numbers, error = report("good")
    assert error is None
    assert "devices          8 x TPU v5 lite (TPU); host: " in text
    assert "LIBTPU_INIT_ARGS --a=b" in text
    assert "numbers: AGREES with the known curve for 6 updates" in text
    assert text.count("kernels          flash attention, loss in 4 pieces; bf16") == 2
    assert text.count("compiles         2 programs in this process, of 61.5, 20.25 s") == 2
    # 256 sequences of 1,024 tokens in 0.3 s, on chips of 197 TFLOP/s.
    rate = 256 * 1024 / 0.3
    assert f"speed of GPT-2 (124M): {rate:,.0f} tokens per second on 8 devices" in text
    assert "step             median 300.0 ms, least 300.0, most 300.0 (updates 5 to 6, 262,144 tokens each)" in text
    assert f"MFU              {rate * 855e6 / (8 * 197e12):.1%} of 1,576 TFLOP/s" in text
    table = json.loads((tpu_report.ROOT / "benchmarks" / "results" / "tpu_124m.json").read_text())
    (cycles,) = [row["cycles"] for row in table if (row["step"], row["topology"]) == ("ours", "v5e-8")]
    estimate = cycles / (197e12 / (4 * 128 * 128 * 2))  # four matrix units of 128 x 128, two FLOP each
    assert f"estimate         {estimate * 1e3:.1f} ms by the compiler's cycles" in text
    assert f"{0.3 / estimate:.2f} times as long" in " ".join(text.split())
    assert "memory           at most 8.00 of 15.75 GiB used on the first device" in text
    assert "host             33.0 ms of tracing" in text
    assert [part["title"] for part in numbers["parts"]] == ["numbers", "speed of GPT-2 (124M)"]
    assert len(numbers["parts"][1]["lines"]) == 6


def test_kernels_that_are_wrong_are_named_and_the_rest_is_checked_without_them(report) -> None:
    text, numbers, error = report("wrong")
    assert "\nnumbers: DIFFERS from the known curve: do not trust this device with flash attention" in text
    assert "\nnumbers without flash attention: AGREES" in text
    assert "largest difference 0.1 of at most" in text
    assert isinstance(error, RunFailed)
    assert str(error).startswith("numbers: DIFFERS")
    assert numbers["parts"][2]["facts"]["kernels"].startswith("flash"), "their speed is still worth knowing"


def test_a_run_that_fails_says_why_and_the_speed_is_that_without_its_kernels(report) -> None:
    text, numbers, error = report("crash")
    assert "\nnumbers: FAILED: the kernel is not to be compiled\n" in text
    assert "last words       measured_run.py: error: the kernel is not to be compiled" in text
    assert "\nnumbers without flash attention: AGREES" in text
    assert numbers["parts"][2]["facts"]["kernels"].startswith("chunked")
    assert isinstance(error, RunFailed)


def test_a_tpu_without_flash_attention_is_told(report) -> None:
    text, _, error = report("no flash", "--no-gpt2")
    assert "FLASH ATTENTION WAS NOT USED: " in text
    assert "speed" not in text
    assert error is None


def after_its_updates(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """`act` once the run says that its updates are done."""

    def then_act(*words: object, **how: object) -> None:
        print(*words, **how)
        if words[0] == "updates are done\n":
            act()

    monkeypatch.setattr(tpu_report, "print", then_act, raising=False)


def test_a_run_that_does_not_end_is_ended_and_what_it_did_is_reported(report, monkeypatch: pytest.MonkeyPatch) -> None:
    class Alarm:
        def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
            assert 0 < seconds <= 120
            after_its_updates(monkeypatch, ring)

        def start(self) -> None: ...

        def cancel(self) -> None: ...

    monkeypatch.setattr(threading, "Timer", Alarm)
    text, _, error = report("hang", "--no-gpt2", "--minutes", "2")
    assert "\nnumbers: FAILED: time was over (--minutes)\n" in text
    assert "until then       AGREES with the known curve for 6 updates" in text
    assert isinstance(error, RunFailed)


@pytest.mark.slow  # a signal to the process of the tests, which under load once ended it
def test_interrupted_it_still_prints_what_is_known(report, monkeypatch: pytest.MonkeyPatch) -> None:
    after_its_updates(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    text, _, error = report("hang")
    assert isinstance(error, KeyboardInterrupt)
    assert "\nnumbers: FAILED: interrupted\n" in text
    assert "until then       AGREES with the known curve for 6 updates" in text
    assert "losses" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "5"], "--steps 5: choose from 6 to 50"),
        (["--minutes", "0"], "--minutes 0: choose a number above 0"),
        (["--json", "/no/such/folder/x"], "--json /no/such/folder/x: No such file or directory"),
        ([], "PJRT_DEVICE is not set"),
    ],
)
def test_wrong_input_is_one_line(flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    monkeypatch.setattr(sys, "argv", ["tpu_report.py", *flags])
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        tpu_report.main()


@pytest.mark.slow  # tests/runtime/test_replicas.py runs what it starts
def test_the_real_runner_on_xla_beside_the_torch_runtime(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A smaller model, whose curve the torch runtime makes here."""
    require_xla()
    small = {"vocab_size": 64, "seq_length": 16, "d_model": 16, "num_layers": 1, "num_heads": 1, "loss_chunks": 1}
    monkeypatch.setattr(curve, "RUN", curve.RUN | small)
    exact = torch_lines(tmp_path / "torch", curve.LEAST_STEPS)
    near = {"largest": 1e-5, "mean": 1e-5, "grad_norm": 1e-4}
    known = {name: [line[key] for line in exact] for name, key in (("losses", "loss"), ("grad_norms", "grad_norm"))}
    (tmp_path / "curve.json").write_text(json.dumps(known | {"measured": {"none": {"here": near}}}))
    monkeypatch.setattr(curve, "_FILE", tmp_path / "curve.json")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setattr(sys, "argv", ["tpu_report.py", "--steps", str(curve.LEAST_STEPS)])
    tpu_report.main()
    text = capsys.readouterr().out
    assert "devices          1 x cpu (CPU)" in text
    assert "kernels          chunked attention, loss in 1 piece; fp32" in text
    assert "compiles         2 programs in this process, of " in text
    assert "numbers: AGREES with the known curve for 6 updates" in text
    assert "losses           " + " ".join(f"{line['loss']:.3f}" for line in exact) in text


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["none", "bf16"])
def test_the_curve_is_that_of_the_torch_runtime(precision: str, tmp_path: Path) -> None:
    lines = torch_lines(tmp_path, curve.STEPS, mixed_precision=precision)
    assert len(lines) == curve.STEPS
    assert curve.compare(lines, precision)["agrees"]


@pytest.mark.slow
def test_all_of_the_curve_on_xla(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    require_xla()
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    monkeypatch.setattr(sys, "argv", ["tpu_report.py"])
    tpu_report.main()
    assert "numbers: AGREES with the known curve for 50 updates" in capsys.readouterr().out


def torch_lines(folder: Path, steps: int, **changes: object) -> curve.Lines:
    """The lines of the known run on the torch runtime, in this process."""
    from gpt2xla.runtime.torch.runtime import TorchRuntime
    from gpt2xla.training.pretrain import pretrain

    pretrain(curve.known_run(folder, steps, **changes), lambda train: TorchRuntime(TorchConfig(), train, "cpu"))
    return curve.read_lines(folder)
