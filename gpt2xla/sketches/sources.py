"""The files of drawings that the options of `prepare_sketches.py` name, here or behind URLs, and their lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from gpt2xla.config.paths import is_url
from gpt2xla.data.documents import compression, json_lines
from gpt2xla.data.documents.corpus import InputFile, here
from gpt2xla.data.documents.input_files import find
from gpt2xla.data.documents.reading_options import COMPRESSIONS
from gpt2xla.data.remote_files import fetched, find_remote
from gpt2xla.errors import InputError, user_error
from gpt2xla.files import file_sha256
from gpt2xla.sketches.quickdraw import Lines

_SUFFIXES = tuple(suffix + packed for suffix in (".ndjson", ".jsonl") for packed in ("", *COMPRESSIONS))
_BLOCK_BYTES = 2 << 20


def find_files(
    inputs: Sequence[str], exclude: tuple[str, ...], folder: Path, say: Callable[[str], None]
) -> list[InputFile]:
    """Return the files that `inputs` name. Those behind URLs will be fetched into `folder`, one at a time. Raises InputError
    if one is not there, or is named by two URLs."""
    local = [name for name in inputs if not is_url(name)]
    files = []
    for file in find(local, _SUFFIXES, exclude, "--input", say) if local else ():
        with user_error(f"--input {file}"):
            size, how = file.stat().st_size, f"sha256 {file_sha256(file)[:12]}"
        files.append(InputFile(str(file), size, partial(here, file), how))
    for url in (name for name in inputs if is_url(name)):
        for found in find_remote(url, "--input", _SUFFIXES):
            if any(found.url == file.name for file in files):
                raise InputError(f"--input names {found.url} twice; name it once")
            opened = partial(fetched, found, "--input", folder)
            files.append(InputFile(found.url, found.size, opened, f"version {found.version}"))
    return files


def lines_of(file: InputFile) -> Iterator[Lines]:
    """Yield the lines of a file in pieces. Raises InputError if there are none, or they cannot be read."""
    number = 0
    with file.opened() as path, compression.readable(file.name):
        layers = compression.layers_of(path, file.name)
        with compression.opened(path, layers) as source:
            for number, block in json_lines.blocks(source, file.name, _BLOCK_BYTES):
                yield Lines(block, number, file.name)
    if not number:
        raise InputError(f"{file.name} holds no drawings; leave it out, or make it again")
