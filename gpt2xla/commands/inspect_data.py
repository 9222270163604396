"""Shows what a folder of token shards holds, and checks it: `python scripts/inspect_data.py data/books`."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import groupby
from typing import TYPE_CHECKING

from gpt2xla.cli import OneLineParser, path
from gpt2xla.config import TOKENIZER_HELP
from gpt2xla.config.paths import check_shards, check_tokenizer
from gpt2xla.errors import InputError, counted

if TYPE_CHECKING:
    from gpt2xla.data.shards import TokenStream
    from gpt2xla.data.tokenizer import Tokenizer

SHOWN_CHARACTERS = 300
SHOWN_IDS = 20
SHOWN_CONVERSATIONS = 4  # of a row
SHOWN_START, SHOWN_END = 120, 40  # characters of a run of trained tokens, or of others


def main() -> None:
    by_flag = dict.fromkeys(("--data", "--train-dir", "--valid-dir"), "")
    parser = OneLineParser(by_flag, description="Show what a folder of token shards holds, and check all of it.")
    parser.add_argument(
        "folder", type=path, metavar="DIR", help="folder or URL of shards, or one with train/ and test/"
    )
    parser.add_argument(
        "--documents", "--rows", type=int, default=3, metavar="N", help="documents or rows to show (default: 3)"
    )
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="show trained tokens in color instead of in [[ ]] (default: auto, on a terminal unless NO_COLOR is set)",
    )
    parser.add_argument(
        "--tokenizer", type=path, metavar="PATH", help=f"{TOKENIZER_HELP} (default: the one beside the shards)"
    )
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True, help="compare the shards with their hashes"
    )
    options = parser.parse_args()
    if options.documents < 0:
        raise InputError(f"--documents {options.documents}: choose a number of at least 0")
    check_shards("DIR", options.folder)
    if options.tokenizer:
        check_tokenizer("--tokenizer", options.tokenizer)
    from gpt2xla.data.inspection import splits

    for name, stream in splits(options.folder).items():
        inspect(name, stream, options)


def inspect(name: str, stream: TokenStream, options: argparse.Namespace) -> None:
    from gpt2xla.data.inspection import check, contents, tokenizer_of

    manifest, tokenizer = stream.manifest, tokenizer_of(stream, options.tokenizer)
    known = manifest or tokenizer
    eot_id = known.eot_id if known else None
    shards = f"{counted(len(stream.files), 'shard')} of {stream.dtype} ({stream.format})"
    print(f"{name}: {counted(stream.length, 'token')} in {shards}", flush=True)
    for note in stream.notes:
        print(note)
    if manifest:
        if stream.is_masked:  # many of its tokens, such as the fill, are no text
            print(counted(manifest.documents, sample_of(tokenizer)))
        else:
            print(f"{counted(manifest.documents, 'document')}, {manifest.bytes / manifest.tokens:.2f} bytes per token")
    if known:
        of = manifest.tokenizer if manifest else options.tokenizer or stream.folder
        print(f"tokenizer {of}, {known.vocab_size:,} ids, end of text {eot_id}")
    if stream.is_masked:
        show_rows(stream, tokenizer, options)
    else:
        show_documents(stream, tokenizer, eot_id, options.documents)
    found = contents(stream, known.vocab_size if known else None, eot_id)
    if not stream.is_masked:  # there the loss is that of some tokens
        if found.documents:
            print(
                f"{counted(found.documents, 'document')} counted, tokens in each: mean {found.mean_length:.1f}, median "
                f"{found.length_quantile(0.5):,}, 90% at most {found.length_quantile(0.9):,}, longest {max(found.lengths):,}"
            )
        print(
            f"unigram entropy {found.unigram_entropy:.4f} nats per token: the loss of a model that ignores context"
            if found.tokens.any() else "none of the tokens is in the vocabulary"
        )  # fmt: skip
    if known:
        print(f"tokens that are not in the vocabulary: {found.foreign:,} ({found.foreign / stream.length:.2%})")
    else:
        print(
            f"{(found.tokens > 0).sum():,} different ids, the largest {len(found.tokens) - 1:,}; --tokenizer tells more"
        )
    check(stream, found, options.verify)
    hashed = manifest and options.verify
    print("checked: sizes, types, " + ("ids and hashes of all shards" if hashed else "ids of all shards; no hashes"))


def show_documents(stream: TokenStream, tokenizer: Tokenizer | None, eot_id: int | None, number: int) -> None:
    from gpt2xla.data.inspection import sample

    for position, ids in sample(stream, eot_id, number, SHOWN_CHARACTERS):
        if tokenizer:
            text = tokenizer.decode(ids)
            shown = repr(text[:SHOWN_CHARACTERS]) + (" ..." if len(text) > SHOWN_CHARACTERS else "")
        else:
            shown = " ".join(map(str, ids[:SHOWN_IDS])) + (" ..." if len(ids) > SHOWN_IDS else "")
        print(f"  token {position:,}: {shown}")


def show_rows(stream: TokenStream, tokenizer: Tokenizer | None, options: argparse.Namespace) -> None:
    from gpt2xla.data.row_inspection import count_rows, sample_rows

    on_terminal = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    in_color = options.color == "always" or (options.color == "auto" and on_terminal)
    before, after = ("\x1b[32m", "\x1b[0m") if in_color else ("[[", "]]")
    if options.documents:
        print(f"trained tokens are shown {before}{'green' if in_color else 'so'}{after}")
    for row in sample_rows(stream, options.documents):
        held = counted(len(row.starts), sample_of(tokenizer))
        print(f"  row {row.number:,}: {held}, {row.trained.sum():,} of {len(row.ids):,} tokens trained")
        for number, runs in enumerate(row.conversations()):
            if number == SHOWN_CONVERSATIONS:
                print(f"    ... and {len(row.starts) - number} more")
                break
            texts = [shown(ids, tokenizer, in_color) for ids, _ in runs]
            print("    " + "".join(f"{before}{t}{after}" if run[1] else t for t, run in zip(texts, runs, strict=True)))
    found = count_rows(stream)
    print(
        f"{counted(len(found.conversations), 'row')} of {found.length:,} tokens, {sample_of(tokenizer)}s in each: mean "
        f"{found.conversations.mean():.1f}, least {found.conversations.min():,}, most {found.conversations.max():,}"
    )
    print(
        f"trained: {counted(found.trained, 'token')}, {found.trained / found.tokens:.1%} of the rows; "
        f"fill at the end of rows: {counted(found.fill, 'token')}, {found.fill / found.tokens:.1%}"
    )
    assert stream.manifest is not None
    if found.trained != (promised := stream.manifest.trained_tokens):
        raise InputError(
            f"{stream.folder}: the manifest promises {promised} trained tokens, but the masks have {found.trained}; copy or "
            "prepare the data again"
        )
    if (more := int(found.conversations.sum()) - stream.manifest.documents) > 0:
        held = f"conversations hold {counted(more, 'end-of-text token')} that are not trained on"
        print(f"note: {held}; what follows each is counted as another conversation")


def sample_of(tokenizer: Tokenizer | None) -> str:
    """Return what a sample of masked rows is."""
    return "drawing" if tokenizer and tokenizer.sketches else "conversation"


def shown(ids: list[int], tokenizer: Tokenizer | None, in_color: bool) -> str:
    """Return the text of `ids` in one line, without its middle if it is long. A backslash stands before what looks like a
    mark or a special token, but is letters."""
    if tokenizer is None:
        return f" {' '.join(map(str, ids[:SHOWN_IDS]))} {'... ' if len(ids) > SHOWN_IDS else ''}"
    special = {tokenizer.backend.token_to_id(token): token for token, yes in tokenizer.added.items() if yes}
    escaped = [*special.values(), *(() if in_color else ("[[", "]]"))]
    text = ""
    for is_special, run in groupby(ids, special.__contains__):
        part = tokenizer.decode(list(run))
        if not is_special:
            part = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in part.replace("\\", r"\\"))
            for look_alike in escaped:
                part = part.replace(look_alike, f"\\{look_alike}")
        text += part
    return text if len(text) <= SHOWN_START + SHOWN_END else f"{text[:SHOWN_START]} ... {text[-SHOWN_END:]}"
