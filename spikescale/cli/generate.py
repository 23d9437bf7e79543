"""`spikescale generate`: text from a trained model, as it is produced."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from spikescale.cli.model_argument import add_model_argument, named_model
from spikescale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model_argument(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text to continue; empty: the start of a document")
    prompt.add_argument("--prompt-file", type=Path, help="UTF-8 file with the text to continue")
    parser.add_argument(
        "--condition",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="begin like a document of this category or source (see data prepare --condition-on); repeatable",
    )
    parser.add_argument("--tokens", type=int, default=256, help="the most tokens to produce for a sample")
    parser.add_argument("--samples", type=int, default=1, help="number of continuations")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the K most probable only; 0: all")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the likeliest of sum P; 1: all")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end of a document")
    parser.add_argument(
        "--backend", choices=("auto", "reference", "cpu"), help="operators (default: the model's)"
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "native", "torch"),
        default="auto",
        help="what runs each token: native (C++, whole models on the CPU), torch (the model itself), or auto",
    )
    parser.add_argument(
        "--weights",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the native engine; bfloat16: rounded, half the memory, up to twice as fast",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the text to standard output, and the speed to standard error."""
    from spikescale.inference import SamplingSettings, stream_text
    from spikescale.inference.device import choose_device
    from spikescale.model.store import find_model_folder, load_model_folder

    if arguments.samples < 1:
        raise UserError(f"--samples {arguments.samples}: must be 1 or more")
    settings = SamplingSettings(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        max_tokens=arguments.tokens,
        stop_at_eos=not arguments.ignore_eos,
    )
    prompt = _prompt(arguments)
    device = choose_device(arguments.device)
    loaded = load_model_folder(find_model_folder(named_model(arguments)), backend=arguments.backend)
    steps = stream_text(
        loaded.model.to(device),
        loaded.tokenizer,
        prompt,
        samples=arguments.samples,
        settings=settings,
        engine=arguments.engine,
        weights=arguments.weights,
        conditions=_conditions(arguments.condition),
    )
    begin = time.perf_counter()
    if arguments.samples == 1:
        count = _write_as_produced(prompt, steps)
    else:
        count = _write_blocks(prompt, steps, arguments.samples)
    seconds = time.perf_counter() - begin
    total = count * arguments.samples
    print(f"{total} tokens in {seconds:.2f} s, {total / seconds:.1f} tokens/s on {device}", file=sys.stderr)
    return 0


def _conditions(words: list[str]) -> list[tuple[str, str]]:
    pairs = [(key, value) for key, equals, value in (word.partition("=") for word in words) if key and equals]
    if len(pairs) < len(words) or len(dict(pairs)) < len(pairs):
        raise UserError(f"--condition {' '.join(words)}: write KEY=VALUE, each key once")
    return pairs


def _prompt(arguments: argparse.Namespace) -> str:
    file = arguments.prompt_file
    if file is None:
        return str(arguments.prompt)
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {file}: cannot be read ({error})") from None


def _write_as_produced(prompt: str, steps: Iterator[list[str]]) -> int:
    """Write prompt and text at once; return the number of tokens."""
    print(prompt, end="", flush=True)
    count = -1  # the last step only finishes the text
    for count, (piece,) in enumerate(steps):  # noqa: B007
        if piece:
            print(piece, end="", flush=True)
    print(flush=True)
    return max(count, 0)


def _write_blocks(prompt: str, steps: Iterator[list[str]], samples: int) -> int:
    """Write each sample under its number when all are complete; return the number of tokens of each."""
    texts = [prompt] * samples
    count = -1
    for count, pieces in enumerate(steps):  # noqa: B007
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    for number, text in enumerate(texts, start=1):
        print(f"--- sample {number} of {samples}\n{text}")
    return max(count, 0)
