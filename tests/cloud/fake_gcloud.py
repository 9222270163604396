"""Plays `gcloud compute tpus` for `cloud/spot_tpu.sh`: queued resources whose TPUs come and go by a plan. Their hosts are
folders of this machine, in which the script's own commands run.

FAKE_CLOUD is a folder. `plan` has a line for each request: `no capacity`, `no quota`, `denied`, or what becomes of the TPU
(`stays`, `preempted`, `suspended`, or `breaks`, which is its connection). `calls` gets a line for each call, `state` holds
the TPU's, and `hosts/` the hosts' disks."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

CLOUD = Path(os.environ["FAKE_CLOUD"])
STATE, HOSTS = CLOUD / "state", CLOUD / "hosts"


def main() -> int:
    words = sys.argv[1:]
    assert words[:2] == ["compute", "tpus"], words
    command = " ".join(words[2:4])
    flags = dict(word[2:].split("=", 1) for word in words[5:] if "=" in word and word.startswith("--"))
    assert flags["zone"] == "us-central1-a"
    with (CLOUD / "calls").open("a") as calls:
        calls.write(f"{command}\n")
    return {
        "queued-resources create": create, "queued-resources describe": describe, "queued-resources delete": delete,
        "tpu-vm describe": describe_tpu, "tpu-vm ssh": ssh,
    }[command](flags)  # fmt: skip


def refuse(message: str) -> int:
    print(f"ERROR: (gcloud.compute.tpus) {message}", file=sys.stderr)
    return 1


def state() -> str:
    return STATE.read_text() if STATE.exists() else ""


def create(flags: dict[str, str]) -> int:
    assert state() == "", "the last one was not deleted"
    assert "--spot" in sys.argv
    assert (flags["accelerator-type"], flags["runtime-version"]) == ("v5litepod-8", "v2-alpha-tpuv5-lite")
    plan = (CLOUD / "plan").read_text().splitlines()
    (CLOUD / "plan").write_text("\n".join(plan[1:]))
    if plan[0] == "no capacity":
        return refuse('There is no more capacity in the zone "us-central1-a"')
    if plan[0] == "no quota":
        return refuse("Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been exceeded")
    if plan[0] == "denied":
        return refuse("PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before")
    (CLOUD / "fate").write_text(plan[0])
    STATE.write_text("WAITING_FOR_RESOURCES")
    return 0


def describe(flags: dict[str, str]) -> int:
    now = state()
    if (CLOUD / "unreadable").exists():
        return refuse("UNAUTHENTICATED: Request had invalid authentication credentials")
    if not now:
        return refuse("NOT_FOUND: Resource was not found")
    if now == "WAITING_FOR_RESOURCES":  # the next look finds it
        for number in range(int(os.environ.get("FAKE_HOSTS", "1"))):
            (HOSTS / str(number)).mkdir(parents=True)
        STATE.write_text("READY")
    print("ACTIVE" if now in ("READY", "PREEMPTED") else now)
    return 0


def describe_tpu(flags: dict[str, str]) -> int:
    print(state())
    return 0


def delete(flags: dict[str, str]) -> int:
    assert "--force" in sys.argv
    if not state():
        return refuse("NOT_FOUND: Resource was not found")
    while HOSTS.exists():
        end_processes()
        shutil.rmtree(HOSTS, ignore_errors=True)
    STATE.unlink()
    return 0


def end_processes() -> None:
    """Of the hosts: those that work in their folders."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(HOSTS):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def connect(host: Path, command: str) -> subprocess.Popen[str]:
    environment = os.environ | {"HOME": str(host), "HOST": host.name}
    return subprocess.Popen(
        ["bash", "-c", command], cwd=host, start_new_session=True, env=environment, stdout=subprocess.PIPE, text=True
    )


def show(connection: subprocess.Popen[str]) -> None:
    assert connection.stdout
    for line in connection.stdout:
        print(line, end="", flush=True)


def ssh(flags: dict[str, str]) -> int:
    assert flags["worker"] == "all"
    assert state() == "READY"
    connections = [connect(host, flags["command"]) for host in sorted(HOSTS.iterdir())]
    # As with ssh, what a host prints after the connection broke goes nowhere.
    readers = [threading.Thread(target=show, args=[each], daemon=True) for each in connections]
    for reader in readers:
        reader.start()
    fate = (CLOUD / "fate").read_text()
    while any(connection.poll() is None for connection in connections):
        time.sleep(0.05)
        trained = (CLOUD / "trains").exists()  # the run is under way
        if trained and fate in ("preempted", "suspended"):
            STATE.write_text(fate.upper())  # of the TPU at once, or of the queued resource
            (CLOUD / "trains").unlink()
            end_processes()
            return 255
        if trained and fate == "breaks":
            (CLOUD / "fate").write_text("stays")
            for connection in connections:
                connection.kill()
            return 255
    for reader in readers:
        reader.join()
    return next((code for connection in connections if (code := connection.returncode)), 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
