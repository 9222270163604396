"""The files of cloud/: they are whole, they say what they cost, and our commands in them are understood. None of them has
run on a cloud."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from conftest import ROOT, run_here

from gpt2xla.runtime.xla.versions import NEWEST

CLOUD = ROOT / "cloud"
FILES = sorted(file for file in CLOUD.iterdir() if file.is_file())
SCRIPTS = [file for file in FILES if file.suffix == ".sh"]
DOCKERFILE = (CLOUD / "Dockerfile").read_text()
TARGETS = ("tpu", "gpu", "cpu")


def ids(files: list[Path]) -> list[str]:
    return [file.name for file in files]


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_a_recipe_says_what_it_costs_and_how_it_resumes(file: Path) -> None:
    text = file.read_text()
    assert re.search(r"^# Costs: ", text, re.MULTILINE)
    assert re.search(r"^# Resumes: ", text, re.MULTILINE)
    assert re.search(r'pages? "[A-Z][^"]+"', text), "a page on which to look prices up"
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert not re.search(r"\$ ?\d|USD|\bcents?\b|\d+ ?%", comments), "prices change"
    assert max(map(len, text.splitlines())) <= 130


@pytest.mark.parametrize("file", SCRIPTS, ids=ids(SCRIPTS))
def test_scripts_are_clean(file: Path) -> None:
    assert os.access(file, os.X_OK)
    subprocess.run(["bash", "-n", file], check=True)
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run([program, file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def commands(text: str) -> list[list[str]]:
    """Our programs' commands in a file: a name of a program, then its arguments."""
    joined = re.sub(r"\\\n#?", " ", text)
    found = re.findall(
        r"(?:python3? (run_pretrain\w*\.py)|python -m (gpt2xla\.doctor)|(cloud/spot_tpu\.sh)) (--[^\n`]+)", joined
    )
    return [["".join(names), *shlex.split(rest.partition("||")[0].rstrip('") '))] for *names, rest in found]


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_our_commands_are_understood(file: Path) -> None:
    found = commands(file.read_text())
    assert found, "none of our commands"
    for program, *arguments in found:
        module = {"cloud/spot_tpu.sh": "run_pretrain_xla.py", "gpt2xla.doctor": "gpt2xla/doctor.py"}.get(
            program, program
        )
        # A mistake after all others: everything before it was understood.
        check = run_here(module, *arguments, "--no-such-flag")
        assert check.returncode == 2
        assert re.search("--no-such-flag is unknown|unrecognized arguments: --no-such-flag\n", check.stderr), (
            check.stderr
        )
        if "pretrain" in module:
            assert "://" in arguments[arguments.index("--checkpoints-dir") + 1] or "$BUCKET" in " ".join(arguments)


def test_the_managed_job_is_recovered_where_the_bucket_is() -> None:
    """By the fields of SkyPilot's page "SkyPilot YAML"."""
    task = yaml.safe_load((CLOUD / "skypilot.yaml").read_text())
    assert set(task) == {"name", "workdir", "resources", "envs", "setup", "run"}
    resources = task["resources"]
    assert set(resources) == {"infra", "accelerators", "accelerator_args", "use_spot", "job_recovery"}
    assert re.fullmatch(r"gcp/[a-z]+-[a-z]+\d", resources["infra"])
    assert re.fullmatch(r"tpu-v\w+-\d+", resources["accelerators"])
    assert resources["use_spot"] is True
    # 2 would be wrong on every machine; 1 is not known to pass.
    assert resources["job_recovery"] == {"strategy": "FAILOVER", "recover_on_exit_codes": [143]}
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_jobset_fits_its_slice_and_stops_for_wrong_input() -> None:
    """By JobSet's v1alpha2 and Kubernetes' Job."""
    job_set = yaml.safe_load((CLOUD / "gke_jobset.yaml").read_text())
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    hosts, chips = job["completions"], container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == hosts
    assert container["resources"]["requests"] == container["resources"]["limits"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert math.prod(map(int, topology.split("x"))) == hosts * chips
    text = (CLOUD / "gke_jobset.yaml").read_text()
    assert f"--tpu-topology={topology} --num-nodes={hosts} --spot" in text
    # A rule about exit codes wants pods that are not started again by themselves.
    assert pod["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob", "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
    }  # fmt: skip
    failure = job_set["spec"]["failurePolicy"]
    (reason,) = failure["rules"]
    assert (reason["action"], reason["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert failure["maxRestarts"] >= 10
    (toleration,) = pod["tolerations"]
    assert pod["nodeSelector"][toleration["key"]] == toleration["value"]
    grace = re.search(r"--grace-seconds (\d+)", text)
    assert grace
    assert int(grace[1]) < pod["terminationGracePeriodSeconds"] <= 15, "GKE's, of a spot node that goes"
    subprocess.run(["bash", "-n"], input=container["command"][-1], text=True, check=True)


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """For each stage what it begins from, and its instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            begins, _, name = rest.partition(" AS ")
            found[name] = (begins, [])
        else:
            found[name][1].append((word, rest))
    return found


def test_the_images_are_made_from_what_is_there() -> None:
    assert {word for word, _ in instructions()} <= {"FROM", "COPY", "RUN", "ENV", "WORKDIR"}
    known = stages()
    assert set(TARGETS) <= set(known)
    for name, (begins, steps) in known.items():
        assert begins in ("scratch", "python:3.12-slim") or begins in list(known)[: list(known).index(name)]
        for word, rest in steps:
            if word == "COPY" and not rest.startswith("--from=code "):
                assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest


@pytest.mark.parametrize("target", TARGETS)
def test_the_images_have_the_tested_versions(target: str) -> None:
    words = shlex.split(" ".join(rest for word, rest in stages()[target][1] if word == "RUN"))
    pins = dict(word.split("==") for word in words if "==" in word)
    assert pins.pop("torch") == NEWEST.pins["torch"] + ("" if target == "gpu" else "+cpu")
    assert pins == ({name: NEWEST.pins[name] for name in ("torch_xla", "libtpu")} if target == "tpu" else {})
    assert ("https://download.pytorch.org/whl/cpu" in words) == (target != "gpu")
    assert words[-1] == (".[xla-tpu,bucket]" if target == "tpu" else ".[bucket]")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_images_are_built(target: str) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker engine runs here")
    image = f"gpt2xla-test:{target}"
    subprocess.run(
        [docker, "build", "-f", CLOUD / "Dockerfile", "--target", target, "-t", image, "."], cwd=ROOT, check=True
    )
    try:
        shown = subprocess.run(
            [docker, "run", "--rm", image, "gpt2xla", "--version"], capture_output=True, text=True, check=True
        )
        assert "gpt2xla" in shown.stdout
    finally:
        subprocess.run([docker, "rmi", image], check=False)


@pytest.mark.parametrize("notebook", ["colab.ipynb", "kaggle_tpu.ipynb"])
def test_the_cell_works_in_the_notebook(notebook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cell.source for cell in nbformat.read(ROOT / "notebooks" / notebook, as_version=4).cells]
    for variable in ("PJRT_DEVICE", "PYTHONUNBUFFERED", "GIT_TERMINAL_PROMPT", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(variable, "")
    names: dict[str, Any] = {}
    first, second = [source for source in cells if source.startswith(("REPOSITORY", "import importlib"))]
    exec(first, names)
    exec(second, names)
    ran: list[str] = []
    names["run"] = ran.append
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE" if "kaggle" in notebook else "COLAB_RELEASE_TAG", "yes")
    asked: list[str] = []
    secrets = types.SimpleNamespace(get_secret=lambda name: asked.append(name) or "{}")
    auth = types.SimpleNamespace(authenticate_user=lambda: asked.append("user"))
    monkeypatch.setitem(sys.modules, "kaggle_secrets", types.SimpleNamespace(UserSecretsClient=lambda: secrets))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(auth=auth))  # type: ignore[arg-type]
    key = tmp_path / "key.json"
    exec((CLOUD / "notebook_cell.py").read_text().replace("/tmp/gcs-key.json", str(key)), names)
    assert names["CHECKPOINTS"] == "gs://YOUR-BUCKET/gpt2"
    assert ran[-1] == "python -m gpt2xla.doctor --bucket gs://YOUR-BUCKET/gpt2 || true"
    assert any("{CHECKPOINTS}" in source and "run_pretrain_xla.py" in source for source in cells)
    if "kaggle" in notebook:
        assert asked == ["GCS_KEY"]
        assert key.read_text() == "{}"
        assert key.stat().st_mode & 0o077 == 0, "others could read the key"
    else:
        assert asked == ["user"]


@pytest.mark.slow
def test_gcloud_knows_the_flags() -> None:
    """Of the real gcloud, where it is installed."""
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    script = (CLOUD / "spot_tpu.sh").read_text().replace("\\\n", " ")
    calls = re.findall(r"\btpu ((?:queued-resources|tpu-vm) \w+)([^|;>\n]*)", script)
    assert len({command for command, _ in calls}) == 5
    for command, rest in calls:
        help_text = subprocess.run(
            ["gcloud", "compute", "tpus", *command.split(), "--help"], capture_output=True, text=True, check=True
        ).stdout
        known = re.findall(r"--[a-z-]+", re.sub(r"\x1b\[[0-9;]*m", "", help_text))
        assert set(re.findall(r"--[a-z-]+", rest)) - {"--checkpoints-dir"} <= set(known), command
