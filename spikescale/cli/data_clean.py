"""Options of `spikescale data prepare` that clean documents."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spikescale.data_pipeline.clean import CleanSettings


def add_cleaning_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group of options; without any of them nothing is cleaned."""
    add = parser.add_argument_group("cleaning (default: none of it; docs/cleaning.md)").add_argument
    add(
        "--fix-unicode",
        action="store_true",
        help="repair mojibake and control characters (ftfy), compose (NFC)",
    )
    add("--min-characters", type=int, metavar="N", help="drop shorter documents")
    add("--max-characters", type=int, metavar="N", help="drop longer documents")
    add(
        "--language",
        nargs="+",
        default=[],
        metavar="CODE",
        help="keep documents in these languages (ISO 639)",
    )
    add("--language-score", type=float, default=0.65, metavar="P", help="least probability of the language")
    add(
        "--quality",
        nargs="+",
        default=[],
        metavar="RULES",
        help="drop by published rules: gopher, gopher-repetition, c4, fineweb",
    )
    add(
        "--quality-rule",
        action="append",
        default=[],
        metavar="NAME=LIMIT",
        help="another limit of a rule, or off; may be given again (default: the published ones)",
    )
    add("--adult-words", metavar="FILE", help="drop documents with these words, one a line; or `builtin`")
    add("--adult-limit", type=int, default=0, metavar="N", help="occurrences of such words that are let pass")
    add(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="PATH",
        help="evaluation sets (files, prepared folders, FOLDER:SPLIT): drop what overlaps with them",
    )
    add("--decontaminate-ngram", type=int, default=13, metavar="N", help="words of the n-grams compared")
    add(
        "--decontaminate-overlap",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="n-grams in an evaluation set, as a share, that are let pass",
    )
    add("--scrub-pii", action="store_true", help="replace e-mail and IP addresses and telephone numbers")
    add(
        "--dedup",
        choices=("off", "exact", "normalised"),
        default="off",
        help="keep one of equal documents; normalised: of equal words, whatever case and punctuation",
    )
    add("--near-dedup", action="store_true", help="keep one of similar documents (MinHash-LSH)")
    add("--near-similarity", type=float, default=0.75, metavar="S", help="least Jaccard similarity, 0 to 1")
    add("--near-ngram", type=int, default=5, metavar="N", help="words of the n-grams that are compared")
    add("--near-bands", type=int, default=14, metavar="N", help="bands of a signature")
    add("--near-rows", type=int, default=8, metavar="N", help="rows of a band")
    add(
        "--max-unknown-share",
        type=float,
        metavar="SHARE",
        help="drop documents of which a larger share of tokens is unknown to the tokenizer",
    )


def cleaning_settings(arguments: argparse.Namespace) -> "CleanSettings":
    """The settings that the options say. Raises UserError."""
    from spikescale.data_pipeline.clean import CleanSettings
    from spikescale.data_pipeline.clean.rules import parse_override

    return CleanSettings(
        fix_unicode=arguments.fix_unicode,
        min_characters=arguments.min_characters,
        max_characters=arguments.max_characters,
        languages=tuple(sorted(set(arguments.language))),
        language_score=arguments.language_score,
        quality=tuple(sorted(set(arguments.quality))),
        rules=tuple(sorted(dict(map(parse_override, arguments.quality_rule)).items())),
        adult_words=arguments.adult_words,
        adult_limit=arguments.adult_limit,
        evaluation_sets=tuple(arguments.decontaminate),
        evaluation_ngram=arguments.decontaminate_ngram,
        evaluation_overlap=arguments.decontaminate_overlap,
        scrub_pii=arguments.scrub_pii,
        duplicates=arguments.dedup,
        near_duplicates=arguments.near_dedup,
        near_similarity=arguments.near_similarity,
        near_ngram=arguments.near_ngram,
        near_bands=arguments.near_bands,
        near_rows=arguments.near_rows,
        max_unknown_share=arguments.max_unknown_share,
    )
