"""Pushes a model to the Hugging Face hub: `python scripts/push_to_hub.py --model checkpoints --name you/my-gpt2`."""

from dataclasses import MISSING, dataclass

from gpt2xla.cli import parse_options
from gpt2xla.config import option, paths
from gpt2xla.errors import as_named


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Push"""

    model: str = option(
        MISSING,
        "a checkpoint, a folder of checkpoints, or any Hugging Face GPT-2 folder, or the URL of one",
        is_path=True,
        check=paths.check_model,
    )
    name: str = option(
        MISSING,
        "repository on the hub, owner/name; a new one is private",
        check=paths.check_hub_name,
        other_names=("repo",),
    )
    branch: str | None = option(None, "branch of the repository (default: its main one)")
    training_state: bool = option(
        False, "also push the optimizer's state and the options, so that a copy can be resumed"
    )


def main() -> None:
    options = parse_options(PushConfig, "Push a model, its card and the picture of its losses to the Hugging Face hub.")
    from gpt2xla.checkpoint.loading import locate
    from gpt2xla.checkpoint.publish import push

    source = locate(options.model, with_training=options.training_state)
    url = push(source, options.name, "--name", branch=options.branch, with_training_state=options.training_state)
    print(f"pushed {as_named(source)} to {url}")
