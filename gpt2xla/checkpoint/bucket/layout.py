"""What lies where below the URL of a run: as in its folder (`run_folder.py`), with objects where that has links.

`COMPLETE` is sent last and deleted first: a `step-*` without it is no checkpoint. `latest` holds the name of the newest one,
which a store that lists late may not list yet. Stores cannot rename: a checkpoint that is set aside has `ABANDONED` instead
of `COMPLETE`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from gpt2xla.checkpoint.run_folder import LATEST
from gpt2xla.checkpoint.seal import COMPLETE
from gpt2xla.errors import InputError
from gpt2xla.logs.sinks import SKETCHES_FOLDER, TENSORBOARD_FOLDER
from gpt2xla.storage import Bucket

ABANDONED = "ABANDONED"
_STEP = re.compile(r"step-\d{8,}")
_FOLDERS = (SKETCHES_FOLDER, TENSORBOARD_FOLDER)


@dataclass
class Layout:
    """The objects of a run, by what they belong to.

    Attributes:
        checkpoints: the files in each `step-*`, by its name.
        others: the run's files that are of no checkpoint, such as metrics.jsonl.
    """

    checkpoints: dict[str, list[str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def whole(self) -> list[str]:
        """The checkpoints that were sent to their end, oldest first."""
        return sorted(name for name, files in self.checkpoints.items() if COMPLETE in files)

    @property
    def abandoned(self) -> list[str]:
        return sorted(name for name, files in self.checkpoints.items() if ABANDONED in files and COMPLETE not in files)


def layout_of(bucket: Bucket) -> Layout:
    """Return what lies below a run's URL. Raises InputError if that is an object, and OSError if it cannot be listed."""
    checkpoints: dict[str, list[str]] = defaultdict(list)
    others = []
    for path in bucket.files():
        if not path:
            raise InputError(f"{bucket.option} {bucket.url} is a file; name a folder, which need not exist")
        top, _, below = path.partition("/")
        if below and _STEP.fullmatch(top):
            checkpoints[top].append(below)
        elif is_small_file(path):
            others.append(path)
    latest = (bucket.read(LATEST) or b"").decode(errors="replace").strip()
    if _STEP.fullmatch(latest) and COMPLETE not in checkpoints[latest]:  # it lists late, or was pruned by hand
        if bucket.read(f"{latest}/{COMPLETE}") is None:
            if not checkpoints[latest]:
                del checkpoints[latest]
        else:
            checkpoints[latest].append(COMPLETE)
    return Layout(dict(checkpoints), sorted(others))


def is_small_file(path: str) -> bool:
    """Whether a file, named relative to the run, goes to the bucket and back along with its checkpoints. Beside them may lie
    what is not the run's, such as shards or other runs, of any size."""
    top, _, below = path.partition("/")
    return not _is_hidden(path) and (top in _FOLDERS if below else top.endswith((".json", ".jsonl")))


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def in_order(paths: Iterable[str]) -> list[str]:
    """Return the files of a checkpoint in the order in which they are deleted."""
    return sorted(paths, key=lambda path: (path != COMPLETE, path))
