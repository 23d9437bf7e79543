"""`spikescale data questions`: question-answer pairs whose answers stand in the articles."""

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  spikescale data questions --input data/wiki/articles.jsonl --output data/questions
  spikescale data questions --input data/wiki/articles.jsonl --tokenizer data/p/tokenizer --output data/q
  ANTHROPIC_API_KEY=... spikescale data questions --provider anthropic --model MODEL \\
      --input data/wiki/articles.jsonl --output data/questions"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="articles: JSON lines, parquet or text files",
    )
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where pairs.jsonl goes; can be continued",
    )
    add(
        "--provider",
        choices=("extractive", "anthropic", "openai"),
        default="extractive",
        help="rules, or a language model whose key is in ANTHROPIC_API_KEY or OPENAI_API_KEY",
    )
    add("--model", metavar="NAME", help="the language model (default: none)")
    add("--base-url", metavar="URL", help="of the API (default: the provider's own)")
    add("--temperature", type=float, metavar="T", help="of the model's sampling (default: the provider's)")
    add("--requests-per-second", type=float, default=1.0, metavar="R", help="at most; one request at a time")
    add("--sections", type=int, default=5, metavar="N", help="that an article is cut into")
    add("--pairs", type=int, default=3, metavar="N", help="asked for of each section")
    add(
        "--tokenizer",
        metavar="SPEC",
        help="a tokenizer or its folder: lengths are in its tokens, and pairs with unknown tokens are "
        "dropped (default: lengths in characters)",
    )
    add("--longest-question", type=int, default=128, metavar="N", help="tokens or characters")
    add("--longest-answer", type=int, default=96, metavar="N", help="tokens or characters")
    add("--limit-articles", type=int, metavar="N", help="read the first N articles (default: all)")
    add("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Make the pairs, and print the counts."""
    from spikescale.data_pipeline.collect.http import Manners
    from spikescale.data_pipeline.questions.make import PAIRS, QuestionSettings, make_questions
    from spikescale.data_pipeline.questions.providers import make_provider
    from spikescale.data_pipeline.tokenizers import make_tokenizer, parse_spec
    from spikescale.errors import UserError

    settings = QuestionSettings(
        sections=arguments.sections,
        pairs=arguments.pairs,
        longest_question=arguments.longest_question,
        longest_answer=arguments.longest_answer,
        limit_articles=arguments.limit_articles,
    )
    tokenizer = None
    if arguments.tokenizer is not None:
        spec = parse_spec(arguments.tokenizer)
        if spec.learns_from is not None:
            raise UserError(
                f"--tokenizer {arguments.tokenizer}: is learnt from a corpus; give the folder "
                "`tokenizer` that `data prepare` made"
            )
        tokenizer = make_tokenizer(spec)
    manners = Manners(requests_per_second=arguments.requests_per_second, timeout=300.0)
    provider = make_provider(
        arguments.provider, arguments.model, arguments.base_url, manners, arguments.temperature
    )

    def say(line: str) -> None:
        if not arguments.quiet:
            print(line, file=sys.stderr, flush=True)

    counts = make_questions(arguments.input, arguments.output, provider, settings, tokenizer, say)
    for name in ("articles", "sections", "pairs"):
        print(f"{name}: {counts[name]:,}")
    for name in sorted(name for name in counts if name.startswith("dropped")):
        print(f"{name}: {counts[name]:,}")
    sent = "" if provider.client is None else f", {provider.client.requests} requests this time"
    print(f"{arguments.output / PAIRS}: complete{sent}")
    return 0
