"""Plots the loss of one or more runs against tokens: `python scripts/plot_loss.py checkpoints --output loss.png`."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpt2xla.checkpoint.run_folder import RUN_CONFIG
from gpt2xla.cli import OneLineParser, path
from gpt2xla.config.paths import is_url
from gpt2xla.errors import InputError, in_one_line, user_error
from gpt2xla.files import folder_name, write_whole
from gpt2xla.logs.sinks import METRICS_FILE
from gpt2xla.storage import Bucket

_KINDS = (".png", ".svg", ".pdf")


def main() -> None:
    parser = OneLineParser(
        {"--run": "", "--checkpoints-dir": ""}, description="Draw training and validation loss against tokens."
    )
    parser.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="checkpoints folders, their URLs, or metrics.jsonl files"
    )
    parser.add_argument(
        "--output",
        type=path,
        metavar="PATH",
        default="loss.png",
        help="picture to write, .png, .svg or .pdf (default: loss.png)",
    )
    parser.add_argument("--log-x", action="store_true", help="draw tokens on a logarithmic axis: shows the beginning")
    parser.add_argument("--more", action="store_true", help="also draw learning rate and gradient norm")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as copies:
        runs = [_copy(run, Path(copies)) if is_url(run) else Path(run) for run in options.runs]
        plot(runs, Path(options.output), log_x=options.log_x, more=options.more)
    print(options.output)


def plot(runs: list[Path], output: Path, *, log_x: bool = False, more: bool = False) -> None:
    """Draw the runs' losses into `output`; a run that is named twice is drawn once. Raises InputError if a run has no
    metrics, `output` cannot be written, or matplotlib is missing."""
    check_picture("--output", output)
    from gpt2xla.logs.run_curves import read_curves

    curves = [read_curves(run) for run in runs]
    with importing_matplotlib():
        from gpt2xla.logs.loss_picture import draw
    once = {os.path.realpath(run.file): run for run in curves}
    picture = draw(list(once.values()), output.suffix.lower()[1:], log_x=log_x, more=more)
    with user_error(f"--output {output}"):
        write_whole(output, picture)


def _copy(url: str, folder: Path) -> Path:
    """Return a copy in `folder` of what is drawn of the run at a URL. Raises InputError if it has no metrics."""
    bucket, run = Bucket(url, "RUN"), folder / folder_name(url) / url.rstrip("/").rpartition("/")[2]
    run.mkdir(parents=True, exist_ok=True)
    for name in (METRICS_FILE, RUN_CONFIG):
        try:
            content = bucket.read(name)
        except OSError as error:
            raise InputError(f"{in_one_line(error)}; check address and credentials") from None
        if content is not None:
            (run / name).write_bytes(content)
        elif name == METRICS_FILE:
            raise InputError(f"{url} has no {METRICS_FILE}; name the --checkpoints-dir of a run")
    return run


def check_picture(flag: str, file: Path) -> None:
    """Raise InputError unless a picture can be written to `file`."""
    if file.suffix.lower() not in _KINDS:
        raise InputError(f"{flag} {file}: give a name that ends in .png, .svg or .pdf")
    if not file.parent.is_dir():
        raise InputError(f"{flag} {file}: there is no folder {file.parent}; make it, or choose another")
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        what = "it is a folder" if file.is_dir() else f"files cannot be written in {file.parent}"
        raise InputError(f"{flag} {file}: {what}; choose another")


def checked_plot(plot: str | None) -> Path | None:
    """Return the file of --plot, None without it. Raises InputError, before hours of measuring, if it could not be drawn."""
    if plot is None:
        return None
    check_picture("--plot", Path(plot))
    with importing_matplotlib():
        import matplotlib  # noqa: F401
    return Path(plot)


@contextlib.contextmanager
def importing_matplotlib() -> Iterator[None]:
    """Turn the lack of matplotlib into an InputError with the fix."""
    try:
        yield
    except ModuleNotFoundError:
        raise InputError("plotting needs matplotlib; pip install 'gpt2xla[plot]'") from None
