"""FineWeb -> token shards: `python scripts/prepare_fineweb.py --output-dir fineweb_10BT`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gpt2xla.cli import parse_options
from gpt2xla.config import option
from gpt2xla.data.documents.reading_options import INPUT_HELP
from gpt2xla.data.preparation.options import OUTPUT_HELP, HubConfig, PrepareConfig

if TYPE_CHECKING:
    from gpt2xla.data.documents.corpus import Part


@dataclass(frozen=True, kw_only=True)
class FinewebConfig(HubConfig, PrepareConfig):
    """FineWeb preparation"""

    config: str | None = option("sample-10BT", "configuration: sample-10BT, sample-100BT, CC-MAIN-2024-10, ...")
    fineweb_edu: bool = option(False, "take HuggingFaceFW/fineweb-edu")
    input: tuple[str, ...] = option((), f"read local ones instead: {INPUT_HELP}", is_path=True)
    output_dir: str = option("./fineweb_10BT", OUTPUT_HELP, is_path=True)


def main() -> None:
    options = parse_options(FinewebConfig, "Tokenise FineWeb into train/ and test/ shards.")
    from gpt2xla.data.documents.corpus import local_parts
    from gpt2xla.data.preparation.hub import dataset_parts
    from gpt2xla.data.preparation.pipeline import prepare_and_report

    if options.fineweb_edu:
        options = replace(options, dataset="HuggingFaceFW/fineweb-edu")

    def parts() -> list[Part]:
        if options.input:
            return local_parts(
                options.input, column=options.text_column, split_by=options.split_by or "file", format=options.format
            )
        return dataset_parts(options)

    prepare_and_report(parts, options)
