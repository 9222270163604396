"""The releases of torch_xla that this program runs on, and the torch, libtpu and jax that go with each.

Every release of torch_xla is built for one torch and one libtpu. This file imports none of them. pyproject.toml's extras
hold the same versions, so pip keeps what a host brings: Colab's TPU image has the first release, Kaggle's the second."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple


class Release(NamedTuple):
    """Versions are prefixes: "0.0.21" also stands for 0.0.21.1, and "2.9" for 2.9.0+cpu."""

    torch: str  # of torch and of torch_xla
    libtpu: str  # the one it was built with
    jax: str | None  # what writes flash attention's kernels for this libtpu; None if its compiler takes no such kernel
    pins: Mapping[str, str]  # what pip installs for it, by package


RELEASES = (
    Release(
        torch="2.9",
        libtpu="0.0.21",
        jax="0.7",
        pins={"torch": "2.9.0", "torch_xla": "2.9.0", "libtpu": "0.0.21.1", "jax": "0.7.2", "jaxlib": "0.7.2"},
    ),
    Release(torch="2.8", libtpu="0.0.17", jax=None, pins={"torch": "2.8.0", "torch_xla": "2.8.0", "libtpu": "0.0.17"}),
)
NEWEST = RELEASES[0]


def is_of(version: str, prefix: str) -> bool:
    """Tell whether `version`, such as 2.9.0+cpu, belongs to `prefix`, such as 2.9."""
    return re.match(rf"{re.escape(prefix)}(?![\d])", version) is not None


def release_of(version: str | None) -> Release | None:
    """Return the release that a torch or a torch_xla of this version belongs to; None if there is none."""
    return next((release for release in RELEASES if version and is_of(version, release.torch)), None)


def release_for(versions: Mapping[str, str]) -> Release:
    """Return the release that completes what is installed. It keeps torch, the largest download, if it can."""
    return release_of(versions.get("torch")) or release_of(versions.get("torch_xla")) or NEWEST


def install(release: Release, *packages: str) -> str:
    """Return the command that installs `packages`; without any, all that the release needs."""
    return "pip install " + " ".join(f"{name}=={release.pins[name]}" for name in packages or release.pins)


def misfits(versions: Mapping[str, str], uses_tpu: bool) -> Iterator[str]:
    """Yield one line, with its fix, for each package that is missing or does not run with the others."""
    release, torch, torch_xla = release_for(versions), versions.get("torch"), versions.get("torch_xla")
    for name, version in (("torch", torch), ("torch_xla", torch_xla)):
        if version is None:
            yield f"{name} is not installed; {install(release, name)}"
    unfit = [name for name in ("torch", "torch_xla") if name in versions and release_of(versions[name]) is not release]
    if len(unfit) == 2 or (unfit and not (torch and torch_xla)):
        known = " or ".join(known.torch for known in RELEASES)
        shown = " and ".join(f"{name} {versions[name]}" for name in unfit)
        yield f"{shown}: this program is for {known}; {install(release, *unfit)}"
    elif unfit:
        yield f"torch {torch} beside torch_xla {torch_xla}: they must be of one release; {install(release, *unfit)}"
    libtpu = versions.get("libtpu")
    if libtpu is None and uses_tpu:
        yield f"libtpu is not installed, and TPUs need it; {install(release, 'libtpu')}"
    elif libtpu and not is_of(libtpu, release.libtpu):
        yield f"libtpu {libtpu}: torch_xla {release.torch} was built with {release.libtpu}; {install(release, 'libtpu')}"
    for name in ("jax", "jaxlib"):
        if name in versions and release.jax and not is_of(versions[name], release.jax):
            yield f"{name} {versions[name]}: flash attention's kernels need {release.jax}; {install(release, name)}"


def why_no_kernels(release: Release, jax: str | None) -> str | None:
    """Return what keeps flash attention's kernels from running on TPUs, or None if nothing does."""
    if release.jax is None:
        return f"it needs torch_xla {NEWEST.torch}, as the libtpu of {release.torch} does not compile its kernels"
    if jax is None or not is_of(jax, release.jax):
        return f"it needs jax {release.jax}, and {jax or 'none'} is installed; {install(release, 'jax')}"
    return None


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of each package that is installed, by the name of its distribution."""
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
