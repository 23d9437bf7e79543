"""`spikescale data`: list sources, prepare shards, inspect what was prepared."""

import argparse
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from spikescale.cli import data_collect, data_compression, data_questions, data_report, data_transfer
from spikescale.cli.data_clean import add_cleaning_arguments, cleaning_settings
from spikescale.errors import UserError

PREPARE_EXAMPLES = """examples:
  spikescale data prepare --source shakespeare --tokenizer byte --output data/shakespeare
  spikescale data prepare --source 'texts/*.jsonl.gz' --tokenizer gpt2 --output data/mine --workers 8
  spikescale data prepare --source fineweb --limit-documents 1000000 --tokenizer neox --output data/fineweb"""

# Actions with a module of their own.
FURTHER: dict[str, tuple[Any, str]] = {
    "collect": (data_collect, "fetch articles of Wikipedia as JSON lines"),
    "questions": (data_questions, "make question-answer pairs out of articles"),
    "compression": (data_compression, "compare tokenizers on a source, each learnt from its training split"),
    "report": (data_report, "an HTML page: what came in, and what was dropped by which rule"),
    "push": (data_transfer.PUSH, "copy prepared data to a URL, and compare every checksum"),
    "pull": (data_transfer.PULL, "copy prepared data from a URL, and compare every checksum"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill in the sub-commands."""
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    _add_list(_action(actions, parser, "list", "the sources that have a name"))
    _add_prepare(_action(actions, parser, "prepare", "turn a source into shards of tokens", PREPARE_EXAMPLES))
    _add_inspect(_action(actions, parser, "inspect", "counts, document lengths and samples of prepared data"))
    for name, (module, summary) in FURTHER.items():
        module.add_arguments(_action(actions, parser, name, summary, module.EXAMPLES))


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen sub-command."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    if arguments.action in FURTHER:
        return int(FURTHER[arguments.action][0].run(arguments))
    return int({"list": _list, "prepare": _prepare, "inspect": _inspect}[arguments.action](arguments))


def _action(
    actions: Any, parser: argparse.ArgumentParser, name: str, summary: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = actions.add_parser(
        name, help=summary, description=summary, epilog=epilog, formatter_class=parser.formatter_class
    )
    return made


def _add_catalog(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--catalog",
        type=Path,
        action="append",
        default=[],
        metavar="YAML",
        help="a file with more sources, in the format of docs/data.md; may be given again (default: none)",
    )


def _add_list(parser: argparse.ArgumentParser) -> None:
    _add_catalog(parser)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--source",
        nargs="+",
        required=True,
        metavar="NAME|PATH|URL",
        help="a name from `data list`, or files, globs, folders, or URLs of such",
    )
    add("--output", type=Path, required=True, metavar="FOLDER", help="where the shards go")
    add(
        "--tokenizer",
        default="byte",
        metavar="SPEC",
        help="byte, char, gpt2, neox, sentencepiece:SIZE[:unigram|bpe], syllable[:SIZE[:LANGUAGE]], "
        "or a tokenizer.json or its folder",
    )
    add("--eos", metavar="TOKEN", help="token that ends documents, for a tokenizer.json with an unusual one")
    add(
        "--fast",
        choices=("auto", "require", "off"),
        default="auto",
        help="encode tokenizer.json kinds with fastokens",
    )
    add(
        "--condition-on",
        metavar="KEYS",
        help="put ids of the documents' metadata in front of them: JSON keys or parquet columns, with commas "
        "between; `source` is also the source's name (default: none)",
    )
    add(
        "--condition-dropout",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="documents, by hash, that are left without such ids, 0 to 1",
    )
    add("--append", action="store_true", help="add the source at the end of the data set that is there")
    add("--overwrite", action="store_true", help="replace what another request left in the output folder")
    _add_catalog(parser)
    reading = parser.add_argument_group("reading (defaults: the catalogue's)")
    reading.add_argument(
        "--text-key", metavar="KEY", help="JSON key or parquet column with the text (default: text)"
    )
    reading.add_argument(
        "--split-on",
        metavar="RULE",
        help="cut text files into documents: file, line, blank-line, or a regular expression (default: file)",
    )
    reading.add_argument(
        "--format", choices=("text", "jsonl", "parquet"), help="of all files (default: by each file's suffix)"
    )
    reading.add_argument("--encoding", help="of text and JSON-lines files (default: utf-8)")
    reading.add_argument(
        "--invalid-bytes",
        choices=("refuse", "replace"),
        help="bytes that are not in the encoding (default: refuse)",
    )
    reading.add_argument(
        "--bad-records",
        choices=("refuse", "quarantine"),
        default="refuse",
        help="stop at a record that cannot be read, or leave it out and write it down in quarantine-*.jsonl",
    )
    reading.add_argument(
        "--max-bad-share",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="stop when more than this share of a partition's or of all records is bad, 0 to 1",
    )
    reading.add_argument(
        "--max-record-mib",
        type=float,
        metavar="MIB",
        help="a longer record is a bad one (default: 64 with --bad-records quarantine, else no limit)",
    )
    reading.add_argument(
        "--partition-mib", type=float, metavar="MIB", help="stored mebibytes that make a shard (default: 32)"
    )
    reading.add_argument(
        "--limit-documents",
        type=int,
        metavar="N",
        help="read about N documents, spread over the source (default: all)",
    )
    split = parser.add_argument_group("split")
    split.add_argument("--valid-fraction", type=float, default=0.05, help="share for validation, 0 to 1")
    split.add_argument("--test-fraction", type=float, default=0.05, help="share for the final test, 0 to 1")
    split.add_argument(
        "--split-by",
        choices=("hash", "position"),
        help="place each document by its hash, or the beginning of the text for training, then validation, "
        "then test, cut to the byte (default: the catalogue's; else hash)",
    )
    split.add_argument(
        "--split-unit",
        choices=("document", "chunk"),
        default="document",
        help="place whole documents, or chunks of them",
    )
    split.add_argument(
        "--chunk-characters", type=int, default=4000, metavar="N", help="longest chunk, in characters"
    )
    add_cleaning_arguments(parser)
    work = parser.add_argument_group("work")
    work.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="Ray worker processes"
    )
    work.add_argument(
        "--no-ray", action="store_true", help="work in this process alone; the result is the same"
    )
    work.add_argument(
        "--ray-address", metavar="ADDRESS", help="a running Ray cluster (default: a fresh local one)"
    )
    work.add_argument(
        "--tokenizer-sample-mchars",
        type=float,
        default=10.0,
        metavar="M",
        help="million characters of training text that SentencePiece learns from",
    )
    work.add_argument("--quiet", action="store_true", help="show no progress")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="what `data prepare` wrote")
    parser.add_argument(
        "--samples", type=int, default=2, metavar="N", help="decoded documents to show of each split"
    )
    parser.add_argument(
        "--characters", type=int, default=300, metavar="N", help="characters to show of each document"
    )
    parser.add_argument(
        "--histogram",
        type=Path,
        metavar="PNG",
        help="where the plot goes (default: FOLDER/document_lengths.png)",
    )
    parser.add_argument("--no-histogram", action="store_true", help="draw no plot")
    parser.add_argument(
        "--verify", choices=("full", "size", "none"), default="full", help="check checksums, or sizes only"
    )


def _list(arguments: argparse.Namespace) -> int:
    from spikescale.data_pipeline.sources import list_sources

    header = ("name", "kind", "size", "licence", "needs", "what")
    rows = [header]
    rows += [
        (info.name, info.kind, info.size, info.licence, info.needs, info.summary)
        for info in list_sources(arguments.catalog)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nLocal files (txt, jsonl, parquet, each also .gz or .zst) need no name: --source PATH")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from spikescale.data_pipeline.prepare import PrepareSettings, prepare
    from spikescale.data_pipeline.quarantine import describe_quarantine
    from spikescale.data_pipeline.sources import open_source
    from spikescale.data_pipeline.sources.base import chosen_options
    from spikescale.data_pipeline.split import SplitSettings
    from spikescale.data_pipeline.tokenizers import parse_spec

    began = time.monotonic()
    keys = tuple(key.strip() for key in (arguments.condition_on or "").split(",") if key.strip())
    if len(set(keys)) < len(keys):
        raise UserError(f"--condition-on {arguments.condition_on}: a key is given twice")
    settings = PrepareSettings(
        tokenizer=arguments.tokenizer,
        eos=arguments.eos,
        split=SplitSettings(
            valid_fraction=arguments.valid_fraction,
            test_fraction=arguments.test_fraction,
            unit=arguments.split_unit,
            chunk_characters=arguments.chunk_characters,
            by=arguments.split_by,
        ),
        limit_documents=arguments.limit_documents,
        tokenizer_sample_characters=int(arguments.tokenizer_sample_mchars * 1_000_000),
        fast=arguments.fast,
        condition_on=keys,
        condition_dropout=arguments.condition_dropout,
        workers=arguments.workers,
        ray=not arguments.no_ray,
        ray_address=arguments.ray_address,
        clean=cleaning_settings(arguments),
        bad_records=arguments.bad_records,
        max_bad_share=arguments.max_bad_share,
        overwrite=arguments.overwrite,
        append=arguments.append,
        quiet=arguments.quiet,
    )
    parse_spec(settings.tokenizer)  # before anything is fetched
    names = ("text_key", "split_on", "format", "encoding", "invalid_bytes")
    given = chosen_options(
        arguments.bad_records,
        keys,
        arguments.partition_mib,
        arguments.max_record_mib,
        **{name: getattr(arguments, name) for name in names},
    )
    source = open_source(arguments.source, catalogs=arguments.catalog, **given)
    manifest = prepare(source, arguments.output, settings)
    print(_table(manifest))
    if line := describe_quarantine(arguments.output):
        print(line)
    seconds = time.monotonic() - began
    print(f"{arguments.output}: complete after {seconds:.1f} s, data set {manifest.sha256[:12]}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from spikescale.data_pipeline.inspect import draw_document_lengths, sample_documents
    from spikescale.data_pipeline.manifest import load_manifest
    from spikescale.data_pipeline.quarantine import describe_quarantine

    manifest = load_manifest(arguments.folder, verify=arguments.verify)
    tokenizer = manifest.tokenizer
    print(
        f"{manifest.folder}: source {manifest.source}, {manifest.dtype} tokens, "
        f"data set {manifest.sha256[:12]}"
    )
    print(f"tokenizer {tokenizer.kind}: {tokenizer.vocab_size:,} ids, end of document {tokenizer.eos_id}")
    print(_table(manifest))
    if line := describe_quarantine(arguments.folder):
        print(line)
    for split, number, text in sample_documents(manifest, arguments.samples):
        shown = text[: arguments.characters]
        more = f" ... ({len(text):,} characters)" if len(text) > len(shown) else ""
        print(f"\n--- {split}, document {number}\n{shown}{more}")
    if not arguments.no_histogram:
        path = arguments.histogram or arguments.folder / "document_lengths.png"
        draw_document_lengths(manifest, path)
        print(f"\nhistogram of document lengths: {path}")
    return 0


def _table(manifest: Any) -> str:
    rows = [("split", "shards", "documents", "tokens", "bytes", "characters", "tokens/byte")]
    for split in manifest.splits:
        totals = manifest.totals(split)
        shards = len(manifest.shards(split))
        ratio = f"{totals.tokens / totals.bytes:.4f}" if totals.bytes else "-"
        counts = (
            shards,
            totals.documents,
            totals.tokens,
            totals.bytes,
            totals.characters,
        )
        rows.append((split, *(f"{count:,}" for count in counts), ratio))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
