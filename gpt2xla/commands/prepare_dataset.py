"""A data set from the hub -> token shards: `python scripts/prepare_dataset.py --dataset roneneldan/TinyStories`."""

from dataclasses import MISSING, dataclass

from gpt2xla.cli import parse_options
from gpt2xla.config import option
from gpt2xla.data.preparation.options import HubConfig, PrepareConfig


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(HubConfig, PrepareConfig):
    """Data set preparation"""

    dataset: str = option(MISSING, "name on the hub, or a local folder", is_path=True)


def main() -> None:
    options = parse_options(DatasetConfig, "Tokenise a text data set into train/ and test/ shards.")
    from gpt2xla.data.preparation.hub import dataset_parts
    from gpt2xla.data.preparation.pipeline import prepare_and_report

    prepare_and_report(lambda: dataset_parts(options), options)
