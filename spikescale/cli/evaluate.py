"""`spikescale evaluate`: loss, perplexity, bits per byte and character over a whole split."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikescale.errors import UserError

if TYPE_CHECKING:
    pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", type=Path, help="run folder, checkpoint or model folder")
    parser.add_argument(
        "--data", type=Path, required=True, help="prepared data (see `spikescale data prepare`)"
    )
    parser.add_argument("--split", default="test", help="train, valid or test")
    parser.add_argument("--context-length", type=int, help="tokens of a window (default: the model's)")
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens scored by each window after the first (default: the context length; "
        "less costs more and gives every token a longer context)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="windows computed together")
    parser.add_argument(
        "--carry-state",
        action="store_true",
        help="read the split in one pass, each token with all those before it as context",
    )
    parser.add_argument("--limit", type=int, help="score only the first tokens of the split")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of the matrix products"
    )
    parser.add_argument("--trigram", action="store_true", help="also a byte trigram model of the train split")
    parser.add_argument(
        "--backend", choices=("auto", "reference", "cpu"), help="operators (default: the model's)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, and print a table or one JSON object."""
    import torch

    from spikescale.data_pipeline.manifest import load_manifest
    from spikescale.data_pipeline.stream import split_tokens
    from spikescale.evaluation import LanguageModelResult, evaluate_tokens
    from spikescale.evaluation.language_model import count_conditions
    from spikescale.inference.device import choose_device
    from spikescale.model.store import find_model_folder, load_model_folder

    if arguments.carry_state and arguments.stride is not None:
        raise UserError("--stride and --carry-state exclude each other: a carried state has no windows")
    device = choose_device(arguments.device)
    manifest = load_manifest(arguments.data)
    totals = manifest.totals(arguments.split)
    loaded = load_model_folder(find_model_folder(arguments.model), backend=arguments.backend)
    if loaded.tokenizer.sha256 != manifest.tokenizer.sha256:
        raise UserError(
            f"{arguments.data}: was prepared with another tokenizer ({manifest.tokenizer.sha256[:12]}) "
            f"than the one of {loaded.folder} ({loaded.tokenizer.sha256[:12]})"
        )
    tokens = split_tokens(manifest, arguments.split)
    count = len(tokens) if arguments.limit is None else min(arguments.limit, len(tokens))
    context_length = loaded.config.context_length
    if arguments.context_length is not None:
        context_length = arguments.context_length
    text_ids = loaded.tokenizer.text_vocab_size
    conditions = 0
    if text_ids < loaded.tokenizer.vocab_size:
        conditions = count_conditions(tokens, text_ids, arguments.limit)
    stride = context_length if arguments.stride is None else arguments.stride
    begin = time.perf_counter()
    nats, scored = evaluate_tokens(
        loaded.model.to(device),
        tokens,
        context_length=context_length,
        stride=stride,
        batch_size=arguments.batch_size,
        eos_id=loaded.tokenizer.eos_id,
        limit=arguments.limit,
        autocast=torch.bfloat16 if arguments.precision == "bfloat16" else None,
        carry_state=arguments.carry_state,
        progress=_progress(count),
        text_ids=text_ids if conditions else None,
    )
    seconds = time.perf_counter() - begin
    result = LanguageModelResult.from_sum(
        nats,
        scored,
        split_tokens=totals.tokens,
        split_bytes=totals.bytes,
        split_characters=totals.characters,
        conditions=conditions,
    )
    shown = {
        "model": str(loaded.folder),
        "data": str(arguments.data),
        "split": arguments.split,
        "context_length": context_length,
        "stride": None if arguments.carry_state else stride,
        "carry_state": arguments.carry_state,
        **result.as_dict(),
        "seconds": seconds,
    }
    if arguments.trigram:
        from spikescale.evaluation.ngram import trigram_baseline

        (shown["trigram_bits_per_byte"],) = trigram_baseline(
            manifest, loaded.tokenizer, [arguments.split]
        ).values()
    _print(shown, arguments.json)
    return 0


def _progress(count: int) -> Callable[[int], None] | None:
    """A line on a terminal's standard error that counts the tokens scored; nothing elsewhere."""
    if not sys.stderr.isatty():
        return None
    scored = 0

    def show(newly_scored: int) -> None:
        nonlocal scored
        scored += newly_scored
        end = "\n" if scored == count else ""
        print(
            f"\r{scored:,} of {count:,} tokens ({scored / count:.0%})", end=end, file=sys.stderr, flush=True
        )

    return show


def _print(shown: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(shown, indent=2))
        return
    width = max(map(len, shown))
    for name, value in shown.items():
        text = (
            f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
        )
        print(f"{name.replace('_', ' '):<{width}}  {text}")
