"""Plots the loss of one or more runs against tokens: `python scripts/plot_loss.py checkpoints --output loss.png`."""

import json
from pathlib import Path

from gpt2xla.cli import OneLineParser, path
from gpt2xla.errors import InputError, user_error
from gpt2xla.logs.sinks import METRICS_FILE


def main() -> None:
    parser = OneLineParser(
        {"--run": "", "--checkpoints-dir": ""}, description="Draw training and validation loss against tokens."
    )
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="checkpoints folders, or metrics.jsonl files")
    parser.add_argument(
        "--output", type=path, metavar="PATH", default="loss.png", help="picture to write (default: loss.png)"
    )
    options = parser.parse_args()
    if not options.output.endswith(".png"):
        raise InputError(f"--output {options.output}: give a name that ends in .png")
    plot([Path(run) for run in options.runs], Path(options.output))
    print(options.output)


def plot(runs: list[Path], output: Path) -> None:
    """Draw the runs' losses into `output`. Raises InputError if a run has no metrics or matplotlib is missing."""
    curves = {run: read_losses(run) for run in runs}
    try:
        import matplotlib
    except ImportError:
        raise InputError("plotting needs matplotlib; pip install 'gpt2xla[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, axes = plt.subplots(figsize=(8, 5))
    for number, (run, (training, validation)) in enumerate(curves.items()):
        color, name = f"C{number}", run.parent.name if run.is_file() else run.name
        axes.plot(*zip(*training, strict=True), color=color, alpha=0.4, linewidth=1, label=f"{name}: training")
        if validation:
            axes.plot(
                *zip(*validation, strict=True), color=color, marker="o", markersize=4, label=f"{name}: validation"
            )
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with user_error(f"--output {output}"):
        figure.savefig(output, dpi=120)
    plt.close(figure)


def read_losses(run: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Return (tokens, loss) of the training lines and of the validation lines of a run."""
    file = run / METRICS_FILE if run.is_dir() else run
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        training = [(line["tokens"], line["loss"]) for line in lines if line.get("loss") is not None]
        validation = [(line["tokens"], line["valid_loss"]) for line in lines if line.get("valid_loss") is not None]
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}; name a folder that a run wrote to") from None
    except (ValueError, KeyError, AttributeError):
        raise InputError(f"{file} does not hold the metrics of a run") from None
    if not training:
        raise InputError(f"{file} holds no training line yet")
    return training, validation
