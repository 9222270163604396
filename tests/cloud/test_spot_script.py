"""`cloud/spot_tpu.sh` against a fake gcloud: what it requests, starts, follows and deletes. What it runs on the hosts runs
here, with programs of the same names in place of git, Python and pip. The run itself counts in a "bucket" that outlives the
hosts."""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, wait_for

SCRIPT = ROOT / "cloud" / "spot_tpu.sh"
FLAGS = ["--train-dir", "gs://bucket/data", "--checkpoints-dir", "gs://bucket/run", "--sample-prompt", 'it\'s a "test"']

GIT = """[ "$*" = "clone --quiet --depth 1 https://example.invalid/gpt2xla gpt2xla" ] || exit 9
mkdir gpt2xla"""
PYTHON3 = """[ "$*" = "-m venv .venv" ] || exit 9
mkdir -p .venv/bin && cp "$PROGRAMS/pip" "$PROGRAMS/python" .venv/bin/"""
PIP = """echo "$*" >> "$FAKE_CLOUD/installed"; exit "$(cat "$FAKE_CLOUD/pip-code" 2> /dev/null || echo 0)" """
# Each start makes steps until there are 5 in all. After two it says so in `trains`, and waits if its TPU is to go.
PYTHON = """echo "$*" >> "$FAKE_CLOUD/started"
[ "$PJRT_DEVICE" = TPU ] || exit 9
if [ -e "$FAKE_CLOUD/code" ]; then echo "error: --bad"; exit "$(cat "$FAKE_CLOUD/code")"; fi
[ "$HOST" = 0 ] || exit 0
for i in 1 2 3 4 5; do
  steps=$(cat "$FAKE_CLOUD/bucket" 2> /dev/null || echo 0)
  [ "$steps" -lt 5 ] || { echo "finished after step $steps"; exit 0; }
  echo $((steps + 1)) > "$FAKE_CLOUD/bucket"
  [ "$i" != 2 ] || [ "$(cat "$FAKE_CLOUD/fate")" = stays ] || touch "$FAKE_CLOUD/trains"
  while [ "$i" = 2 ] && [ "$(cat "$FAKE_CLOUD/fate")" != stays ]; do sleep 0.05; done
  while [ -e "$FAKE_CLOUD/hold" ]; do sleep 0.05; done
done"""


class Cloud:
    """A folder with a plan, the programs that the script finds, and what it printed."""

    def __init__(self, folder: Path, *plan: str) -> None:
        self.folder, programs = folder, folder / "programs"
        programs.mkdir()
        (folder / "plan").write_text("\n".join(plan))
        gcloud = f'exec "{sys.executable}" "{Path(__file__).with_name("fake_gcloud.py")}" "$@"'
        for name, text in dict(gcloud=gcloud, git=GIT, python3=PYTHON3, pip=PIP, python=PYTHON).items():
            (programs / name).write_text(f"#!/bin/bash\n{text}\n")
            (programs / name).chmod(0o755)
        self.environment = os.environ | dict(
            FAKE_CLOUD=str(folder), PROGRAMS=str(programs), NAME="gpt2", ZONE="us-central1-a",
            TYPE="v5litepod-8", REPOSITORY="https://example.invalid/gpt2xla", POLL="0.1",
            PATH=f"{programs}:{os.environ['PATH']}",
        )  # fmt: skip

    def start(self, *flags: str, **environment: str) -> subprocess.Popen[str]:
        (self.folder / "trains").unlink(missing_ok=True)
        return subprocess.Popen(
            [str(SCRIPT), *(flags or FLAGS)], env=self.environment | environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, *flags: str, **environment: str) -> tuple[int, str]:
        process = self.start(*flags, **environment)
        printed, _ = process.communicate(timeout=120)
        return process.returncode, printed

    def lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []

    def calls(self) -> Counter[str]:
        return Counter(self.lines("calls"))

    def is_empty(self) -> bool:
        return not (self.folder / "state").exists() and not (self.folder / "hosts").exists()


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def plan(cloud: Cloud, *lines: str) -> None:
    (cloud.folder / "plan").write_text("\n".join(lines))


def test_a_run_survives_its_machines(cloud: Cloud) -> None:
    plan(cloud, "no capacity", "preempted", "no quota", "suspended", "stays")
    code, printed = cloud.run()
    assert code == 0, printed
    assert cloud.is_empty(), "a machine is left, and costs money"
    # The two preempted starts made two steps each, the third the last one.
    assert cloud.lines("bucket") == ["5"]
    assert cloud.lines("started") == [" ".join(["run_pretrain_xla.py", *FLAGS])] * 3
    calls = cloud.calls()
    assert calls["queued-resources create"] == 5
    assert calls["queued-resources delete"] == 3
    assert printed.count("no more capacity") == printed.count("Quota limit") == 1
    assert printed.count("the TPU was taken away") == 2
    assert "finished after step 5" in printed, "the run's own lines are shown"
    installed = cloud.lines("installed")[0]
    assert "download.pytorch.org/whl/cpu" in installed
    assert installed.endswith(".[xla-tpu,bucket]")


def test_all_hosts_of_a_pod_get_the_command(cloud: Cloud) -> None:
    plan(cloud, "stays")
    code, printed = cloud.run(FAKE_HOSTS="3")
    assert code == 0, printed
    assert len(cloud.lines("started")) == 3


def test_wrong_input_is_not_tried_again(cloud: Cloud) -> None:
    plan(cloud, "stays")
    (cloud.folder / "code").write_text("2")
    code, printed = cloud.run()
    assert code == 2
    assert "error: --bad" in printed
    assert len(cloud.lines("started")) == 1
    assert cloud.is_empty()


def test_a_run_that_keeps_failing_is_given_up(cloud: Cloud) -> None:
    plan(cloud, "stays")
    (cloud.folder / "code").write_text("1")
    code, printed = cloud.run()
    assert code == 1
    assert "failed three times" in printed
    assert len(cloud.lines("started")) == 3
    assert cloud.is_empty()


def test_a_run_that_was_asked_to_stop_is_started_again(cloud: Cloud) -> None:
    plan(cloud, "stays")
    (cloud.folder / "code").write_text("143")
    process = cloud.start()
    wait_for(lambda: len(cloud.lines("started")) > 3)  # more often than one that fails
    (cloud.folder / "code").unlink()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "the run was asked to stop, and has saved" in printed
    assert cloud.lines("bucket") == ["5"]


def test_an_install_that_fails_is_no_wrong_input(cloud: Cloud) -> None:
    """pip ends with 2 where its own program breaks, as for lack of a network."""
    plan(cloud, "stays")
    (cloud.folder / "pip-code").write_text("2")
    code, printed = cloud.run()
    assert code == 1, printed
    assert cloud.lines("started") == []
    assert len(cloud.lines("installed")) == 3
    assert cloud.is_empty()


def test_a_broken_connection_starts_nothing_again(cloud: Cloud) -> None:
    plan(cloud, "breaks")
    code, printed = cloud.run()
    assert code == 0, printed
    assert cloud.lines("started") == cloud.lines("started")[:1]
    assert cloud.calls()["tpu-vm ssh"] == 2
    assert "the connection broke" in printed


def test_a_start_that_broke_off_fails(tmp_path: Path) -> None:
    """The connection broke after the host made the folder, before the run started: nothing comes of it."""
    script = SCRIPT.read_text()
    functions = script[script.index("on_host()") : script.index("follow()")]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    (tmp_path / f"run-{boot}-1").mkdir()
    command = f"{functions}\nsleep() {{ :; }}\non_host 1 https://example.invalid/gpt2xla"
    result = subprocess.run(["bash", "-c", command], env=os.environ | {"HOME": str(tmp_path)}, timeout=60, check=False)
    assert result.returncode == 101


def test_ctrl_c_leaves_the_run_and_the_same_command_follows_it(cloud: Cloud) -> None:
    plan(cloud, "stays")
    (cloud.folder / "hold").touch()
    process = cloud.start()
    wait_for(lambda: cloud.lines("bucket"))
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "trains on and costs money" in printed
    assert "queued-resources delete gpt2 --zone=us-central1-a --force" in printed
    assert cloud.lines("state") == ["READY"]
    (cloud.folder / "hold").unlink()
    code, printed = cloud.run()
    assert code == 0, printed
    assert len(cloud.lines("started")) == 1, "it was running"
    assert cloud.calls()["queued-resources create"] == 1
    assert cloud.is_empty()


def test_a_refusal_ends_at_once(cloud: Cloud) -> None:
    plan(cloud, "denied")
    code, printed = cloud.run()
    assert code == 2
    assert "PERMISSION_DENIED" in printed
    assert "nothing was created" in printed
    assert cloud.calls()["queued-resources create"] == 1


def test_a_state_that_cannot_be_read_ends_at_once(cloud: Cloud) -> None:
    (cloud.folder / "unreadable").touch()
    code, printed = cloud.run()
    assert code == 1
    assert "UNAUTHENTICATED" in printed
    assert set(cloud.calls()) == {"queued-resources describe"}


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        (FLAGS, {"ZONE": ""}, "set NAME, ZONE"),
        (["--checkpoints-dir", "checkpoints"], {}, "must be a URL"),
        (["--train-dir", "gs://bucket/data"], {}, "must be a URL"),
    ],
)
def test_mistakes_cost_nothing(cloud: Cloud, flags: list[str], environment: dict[str, str], words: str) -> None:
    code, printed = cloud.run(*flags, **environment)
    assert code == 2
    assert words in printed
    assert not cloud.calls()
