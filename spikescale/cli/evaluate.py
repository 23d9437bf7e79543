"""`spikescale evaluate`: perplexity and bits of a text, last words, tasks of lm-evaluation-harness."""

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikescale.cli.model_argument import add_model_argument, named_model
from spikescale.errors import UserError

if TYPE_CHECKING:
    from spikescale.model.store import LoadedModel

EXAMPLES = """examples:
  spikescale evaluate runs/tiny --data data/shakespeare-byte --split test --stride 64
  spikescale evaluate runs/tiny --text notes.txt --state carry --json
  spikescale evaluate runs/216m --text wikitext-2/test.txt --detokenize wikitext
  spikescale evaluate runs/216m --lambada lambada
  spikescale evaluate runs/216m --tasks piqa,lambada_openai --limit 200"""

# How figures are called in the table; in JSON they have the name at the left.
LABELS = {
    "token_loss": "token loss (nats)",
    "token_perplexity": "token perplexity",
    "bits_per_byte": "bits per byte (BPB)",
    "bits_per_character": "bits per character (BPC)",
    "word_perplexity": "word perplexity",
    "word_perplexity_with_line_ends": "word perplexity, line ends counted as words",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = EXAMPLES
    add_model_argument(parser)
    what = parser.add_argument_group("what on (one of them)").add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data", type=Path, metavar="FOLDER", help="prepared data (see `spikescale data prepare`)"
    )
    what.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="text files, each a document; .jsonl, .parquet too",
    )
    what.add_argument(
        "--lambada",
        metavar="NAME|FILE",
        help="passages whose last word is to be guessed: `lambada` (from the hub), a .jsonl, or a text file "
        "with one a line",
    )
    what.add_argument(
        "--tasks", metavar="NAMES", help="tasks of lm-evaluation-harness, with commas between (extra `eval`)"
    )
    text = parser.add_argument_group("text")
    text.add_argument("--split", default="test", help="of --data: train, valid or test")
    text.add_argument(
        "--window", "--context-length", type=int, metavar="TOKENS", help="of a window (default: the model's)"
    )
    text.add_argument(
        "--stride",
        type=int,
        metavar="TOKENS",
        help="tokens scored by each window after the first (default: the window; "
        "less costs more and gives every token a longer context)",
    )
    text.add_argument(
        "--state",
        choices=("window", "carry"),
        default="window",
        help="the context of a token: what its window holds, or everything before it, in one pass",
    )
    text.add_argument(
        "--limit", type=int, metavar="N", help="only the first tokens, passages, items of a task"
    )
    text.add_argument(
        "--detokenize",
        metavar="NAME",
        help="wikitext: let the model read WikiText as it would be written, and count words as published "
        "(default: nothing is changed)",
    )
    text.add_argument(
        "--trigram", action="store_true", help="of --data, also a byte trigram model of the train split"
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples in front (default: the task's)")
    tasks.add_argument(
        "--include-path", type=Path, metavar="FOLDER", help="with tasks of your own in YAML (default: none)"
    )
    work = parser.add_argument_group("work")
    work.add_argument("--batch-size", type=int, default=8, help="windows or contexts computed together")
    work.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of the matrix products"
    )
    work.add_argument(
        "--backend", choices=("auto", "reference", "cpu"), help="operators (default: the model's)"
    )
    work.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    work.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, and print a table or one JSON object."""
    import torch

    from spikescale.inference.device import choose_device
    from spikescale.model.store import find_model_folder, load_model_folder

    _require_sense(arguments)
    device = choose_device(arguments.device)
    loaded = load_model_folder(find_model_folder(named_model(arguments)), backend=arguments.backend)
    loaded.model.to(device)
    begin = time.perf_counter()
    autocast = torch.bfloat16 if arguments.precision == "bfloat16" else None
    if arguments.data is not None or arguments.text is not None:
        shown = _language_model(arguments, loaded, autocast)
    else:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            shown = (_lambada if arguments.lambada is not None else _tasks)(arguments, loaded)
    shown = {"model": str(loaded.folder), **shown, "seconds": time.perf_counter() - begin}
    _print(shown, arguments.json)
    return 0


def _require_sense(arguments: argparse.Namespace) -> None:
    if arguments.state == "carry" and arguments.stride is not None:
        raise UserError("--stride and --state carry exclude each other: a carried state has no windows")
    if arguments.trigram and arguments.data is None:
        raise UserError("--trigram needs --data: it is fitted on the train split")
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit}: must be at least 1")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: must be at least 1")
    if arguments.window is not None and arguments.window < 1:
        raise UserError(f"--window {arguments.window}: must be at least 1")
    of_tasks = {"--num-fewshot": arguments.num_fewshot, "--include-path": arguments.include_path}
    for name, value in of_tasks.items():
        if value is not None and arguments.tasks is None:
            raise UserError(f"{name} goes with --tasks")
    for name in ("stride", "detokenize"):
        if getattr(arguments, name) is not None and arguments.data is None and arguments.text is None:
            raise UserError(f"--{name} goes with --data or --text")


def _language_model(arguments: argparse.Namespace, loaded: "LoadedModel", autocast: Any) -> dict[str, Any]:
    from spikescale.data_pipeline.manifest import load_manifest
    from spikescale.evaluation import LanguageModelResult, evaluate_tokens
    from spikescale.evaluation.detokenize import detokenizer
    from spikescale.evaluation.language_model import count_conditions
    from spikescale.evaluation.texts import file_text, split_text

    tokenizer = loaded.tokenizer
    rewrite = None if arguments.detokenize is None else detokenizer(arguments.detokenize)
    where: dict[str, Any]
    if arguments.data is not None:
        manifest = load_manifest(arguments.data)
        text = split_text(manifest, arguments.split, tokenizer, rewrite, arguments.limit)
        where = {"data": str(arguments.data), "split": arguments.split}
    else:
        text = file_text(arguments.text, tokenizer, rewrite, arguments.limit)
        where = {"text": " ".join(map(str, arguments.text))}
    tokens = text.tokens
    count = len(tokens) if arguments.limit is None else min(arguments.limit, len(tokens))
    window = arguments.window or loaded.config.context_length
    conditions = 0
    if tokenizer.text_vocab_size < tokenizer.vocab_size:
        conditions = count_conditions(tokens, tokenizer.text_vocab_size, arguments.limit)
    stride = window if arguments.stride is None else arguments.stride
    carry = arguments.state == "carry"
    with _progress("evaluating", count, "tokens") as advance:
        nats, scored = evaluate_tokens(
            loaded.model,
            tokens,
            context_length=window,
            stride=stride,
            batch_size=arguments.batch_size,
            eos_id=tokenizer.eos_id,
            limit=arguments.limit,
            autocast=autocast,
            carry_state=carry,
            progress=advance,
            text_ids=tokenizer.text_vocab_size if conditions else None,
        )
    result = LanguageModelResult.from_sum(
        nats,
        scored,
        split_tokens=len(tokens),
        split_bytes=text.bytes,
        split_characters=text.characters,
        conditions=conditions,
    )
    share = scored / len(tokens)
    shown = {
        **where,
        "detokenize": arguments.detokenize,
        "window": None if carry else window,
        "stride": None if carry else stride,
        "state": arguments.state,
        "token_loss": result.loss,
        "token_perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "bits_per_character": result.bits_per_character,
        "word_perplexity": _perplexity(nats, text.words * share),
        "word_perplexity_with_line_ends": _perplexity(nats, (text.words + text.line_ends) * share),
        "tokens": result.tokens,
        "bytes": result.bytes,
        "characters": result.characters,
        "words": text.words * share,
        "line_ends": text.line_ends * share,
        "documents": text.documents * share,
    }
    if arguments.trigram:
        from spikescale.evaluation.ngram import trigram_baseline

        (shown["trigram_bits_per_byte"],) = trigram_baseline(manifest, tokenizer, [arguments.split]).values()
    return shown


def _perplexity(nats: float, units: float) -> float:
    """exp of the nats a unit; not a number where there is no unit, infinite where it cannot be written."""
    if not units:
        return math.nan
    return math.exp(nats / units) if nats / units < 700 else math.inf


def _lambada(arguments: argparse.Namespace, loaded: "LoadedModel") -> dict[str, Any]:
    from itertools import islice

    from spikescale.data_pipeline.sources import open_source
    from spikescale.data_pipeline.sources.readers import format_of
    from spikescale.evaluation.last_word import evaluate_last_word
    from spikescale.evaluation.scoring import Scorer

    path = Path(arguments.lambada)
    plain = path.is_file() and format_of(path) in (None, "text")
    given: dict[str, Any] = {"format": "text", "split_on": "line"} if plain else {}
    partitions = open_source([arguments.lambada], **given).partitions()
    texts = (document.text for partition in partitions for document in partition.documents())
    passages = list(islice(texts, arguments.limit))
    window = None if arguments.state == "carry" else arguments.window or loaded.config.context_length
    scorer = Scorer(
        loaded.model, loaded.tokenizer.eos_id, loaded.tokenizer.vocab_size, arguments.batch_size, window
    )
    with _progress("guessing", len(passages), "passages") as advance:
        result = evaluate_last_word(scorer, loaded.tokenizer, passages, advance)
    return {
        "lambada": arguments.lambada,
        "window": window,
        "state": arguments.state,
        **result.as_dict(),
    }


def _tasks(arguments: argparse.Namespace, loaded: "LoadedModel") -> dict[str, Any]:
    try:
        from spikescale.evaluation.harness import evaluate_tasks
    except ModuleNotFoundError as error:
        raise UserError(f"--tasks needs {error.name}: pip install 'spikescale[eval]'") from None

    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    window = None if arguments.state == "carry" else arguments.window or loaded.config.context_length
    results = evaluate_tasks(
        loaded,
        names,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        include_path=arguments.include_path,
        batch_size=arguments.batch_size,
        window=window,
        progress=sys.stderr.isatty(),
    )
    return {"window": window, "state": arguments.state, **results}


@contextlib.contextmanager
def _progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None] | None]:
    """A bar on a terminal's standard error; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def _print(shown: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(shown, indent=2))
        return
    labels = {name: LABELS.get(name, name.replace("_", " ")) for name in shown}
    width = max(map(len, labels.values()))
    for name, value in shown.items():
        if value is not None and not isinstance(value, dict):
            print(f"{labels[name]:<{width}}  {_shown(value)}")
    for task, figures in shown.get("tasks", {}).items():
        print(f"\n{task}")
        width = max(map(len, figures), default=0)
        for name, value in figures.items():
            print(f"  {name:<{width}}  {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        if abs(value) >= 1e9:
            return f"{value:.4g}"
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 100 else f"{value:.4f}"
    return f"{value:,}" if type(value) is int else str(value)
