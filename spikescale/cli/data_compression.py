"""`spikescale data compression`: how many tokens tokenizers make of the same held-out text."""

import argparse
from typing import Any

from spikescale.errors import UserError

EXAMPLES = """examples:
  spikescale data compression --source sotu
  spikescale data compression --source 'texts/*.jsonl' --tokenizer char syllable sentencepiece:4000:bpe"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--source", nargs="+", required=True, metavar="NAME|PATH", help="as for `data prepare`")
    add(
        "--tokenizer",
        nargs="+",
        default=["byte", "char", "syllable:2000", "sentencepiece:2400:bpe"],
        metavar="SPEC",
        help="tokenizers, as for `data prepare`",
    )
    add("--text-key", default="text", metavar="KEY", help="JSON key or parquet column with the text")
    add("--held-out", type=float, default=0.1, metavar="SHARE", help="documents, by hash, that are measured")
    add(
        "--tokenizer-sample-mchars",
        type=float,
        default=10.0,
        metavar="M",
        help="million characters of training text that SentencePiece learns from",
    )


def run(arguments: argparse.Namespace) -> int:
    """Learn, encode and print the table."""
    from spikescale.data_pipeline.compression import measure
    from spikescale.data_pipeline.sources import open_source
    from spikescale.data_pipeline.split import SplitSettings

    if not 0 < arguments.held_out < 1:
        raise UserError(f"--held-out {arguments.held_out}: must be above 0 and below 1")
    source = open_source(arguments.source, text_key=arguments.text_key)
    split = SplitSettings(valid_fraction=arguments.held_out, test_fraction=0.0)
    rows = measure(source, arguments.tokenizer, split, int(arguments.tokenizer_sample_mchars * 1_000_000))
    cells: list[tuple[Any, ...]] = [
        ("tokenizer", "ids", "tokens", "characters/token", "bytes/token", "unknown", "million characters/s")
    ]
    cells += [
        (
            row.spec,
            f"{row.vocab_size:,}",
            f"{row.tokens:,}",
            f"{row.characters / row.tokens:.3f}",
            f"{row.bytes / row.tokens:.3f}",
            f"{row.unknown:,}",
            f"{row.characters / row.seconds / 1e6:.2f}",
        )
        for row in rows
    ]
    print(
        f"{rows[0].documents:,} held-out documents of {source.name}, {rows[0].characters:,} characters, "
        f"{rows[0].bytes:,} bytes"
    )
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))
    return 0
