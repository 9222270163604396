"""benchmarks/gpu.py continues after steps that fail or hang, ends all that they started, and writes what is known."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_page  # noqa: E402, F401  it is imported late

sys.path.pop()  # its generation.py would hide tests/generation

PROGRAM = """
import json, os, subprocess, sys, time
step, work = sys.argv[1], sys.argv[3]
say = lambda kind, **values: print(json.dumps({"report": kind, **values}), flush=True)
if step == "environment":
    say("environment", card="NVIDIA Test 1", memory_GB=80, driver="1", cores=2, python="3", torch="2", cuda="12", cudnn=9,
        triton="3", transformers="5")
elif step == "wrong":
    print("a line that is no report")
    say("check", passed=True, what="one")
    say("check", passed=False, what="two")
elif step == "hangs":
    say("check", passed=True, what="before it hung")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
    open(work + "/../child", "w").write(str(child.pid))
    time.sleep(100)
elif step == "breaks":
    sys.exit("it broke")
else:
    say("check", passed=True, what="the last step")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_steps_that_fail_or_hang_do_not_keep_the_others_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(gpu, "CORRECTNESS", program)
    names = ("environment", "wrong", "hangs", "breaks", "last", "none")
    steps = [gpu.Step(name, program, 2 if name == "hangs" else 10, 1) for name in names]
    monkeypatch.setattr(gpu, "STEPS", steps)
    work = tmp_path / "work"
    work.mkdir()
    checked = gpu.Check(gpu.MINUTES, None, work, tmp_path / "out", [])
    for step in steps[:-1]:
        checked.make(step)
    checked.minutes = 0
    checked.make(steps[-1])
    status = {step["step"]: step["status"] for step in checked.results["steps"]}
    assert [status[name] for name in ("environment", "wrong", "last")] == ["done"] * 3
    assert status["hangs"].startswith("stopped after")
    assert status["breaks"] == "failed with exit code 1"
    assert status["none"] == "left out: no time"
    failures = checked.failures()
    assert failures[0] == "two"
    assert [failure.split(":")[0] for failure in failures[1:]] == ["hangs", "breaks"]
    written = json.loads((tmp_path / "out/gpu_test_1.json").read_text())
    assert [report["what"] for report in written["reports"]] == ["one", "two", "before it hung", "the last step"]
    page = (tmp_path / "out/gpu_test_1.md").read_text()
    assert "3 of 4 checks passed" in page
    assert "it broke" in page
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 5
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < end, "a process of the stopped step is still there"
        time.sleep(0.05)


@pytest.mark.parametrize("options", [["--minutes", "0"], ["--nanogpt", "nowhere/model.py"], ["--out", __file__]])
def test_wrong_input_ends_with_exit_code_2(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2


def test_a_machine_without_a_gpu_ends_with_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", os.fspath(tmp_path)])
    assert gpu.main() == 2
