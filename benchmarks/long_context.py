"""Cost of a token against the length of its context: training and streaming generation.

    python benchmarks/long_context.py

Training: whole optimizer steps (`peers.py`) of the same number of tokens, cut into sequences of 1,024 to
65,536, in interleaved rounds; the peak memory of the activations of each in a process of its own.
Streaming: one sequence, token by token through `spikescale.inference.decoder` in float32, from the state
that a prefix of 1,024 to 65,536 tokens left. Where the cost does not depend on the context, lines are flat.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Timing, arguments, in_own_process, measure, positive, random_tokens, show, write_results
from peers import spikegpt, spikegpt_checkpointed, step_memory, vocab_size
from torch import Tensor

from spikescale.config import ModelConfig, load_model_preset
from spikescale.errors import UserError
from spikescale.files import written_aside
from spikescale.inference.decoder import Decoder
from spikescale.model import SpikeGPT, State

PREFIX_CHUNK = 1024  # tokens of a prefix read at once


def train(config: ModelConfig, options: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Time and memory of a token of a training step, by length of the sequences."""
    vocab = vocab_size(config)
    batches = {length: options.tokens // length for length in options.lengths}
    name = "spikegpt-checkpointed" if options.checkpointed else "spikegpt"
    memory = {
        length: in_own_process(step_memory, name, config, batch, length, options.threads)
        for length, batch in batches.items()
    }
    step = (spikegpt_checkpointed if options.checkpointed else spikegpt)(config)
    calls = {
        str(length): partial(step, random_tokens(batch, length, vocab)) for length, batch in batches.items()
    }
    timings = measure(calls, options.repeats)
    return {
        length: {
            "batch": batch,
            "seconds_token": per_token(timings[str(length)], options.tokens),
            "activation_bytes_token": memory[length]["activation_bytes"] / options.tokens,
        }
        for length, batch in batches.items()
    }


@torch.no_grad()
def stream(config: ModelConfig, options: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Time of a token read from the state at each position, and the size of that state."""
    model = SpikeGPT(config).eval()
    tokens = random_tokens(1, options.streamed, vocab_size(config))[:, : options.streamed]
    states = read_prefixes(model, options.positions)
    decoder = Decoder(model)
    check_streaming(model, decoder, tokens, states[min(states)])
    calls = {
        str(position): partial(read_one_by_one, decoder, tokens, state) for position, state in states.items()
    }
    timings = measure(calls, options.repeats)
    return {
        position: {
            "seconds_token": per_token(timings[str(position)], options.streamed),
            "state_bytes": sum(
                entry.numel() * entry.element_size() for block in state for entry in block.values()
            ),
        }
        for position, state in states.items()
    }


def read_prefixes(model: SpikeGPT, positions: list[int]) -> dict[int, State]:
    """The state after each of `positions` tokens of one random text."""
    text = random_tokens(1, max(positions), vocab_size(model.config), seed=1)
    states: dict[int, State] = {}
    state, read = None, 0
    for position in sorted(positions):
        for chunk in text[:, read:position].split(PREFIX_CHUNK, dim=1):
            _, state = model(chunk, state)
        assert state is not None
        states[position], read = state, position
    return states


def read_one_by_one(decoder: Decoder, tokens: Tensor, state: State) -> Tensor:
    """Logits (1, T, V) of tokens (1, T) given one at a time."""
    decoder.load_state(state)
    return torch.stack([decoder.step(token) for token in tokens.unbind(1)], dim=1)


def check_streaming(model: SpikeGPT, decoder: Decoder, tokens: Tensor, state: State) -> None:
    """Refuse to time a stream that computes something else than the model does on the whole sequence."""
    expected, _ = model(tokens, state)
    difference = (read_one_by_one(decoder, tokens, state) - expected).abs().amax(dim=-1)
    # Not of every token: a neuron within rounding of its threshold may fire in one of the two only.
    typical = float(difference.median() / expected.abs().max())
    if not typical < 1e-4:
        raise UserError(f"streaming differs from the model by {typical:.1e}; nothing was timed")


def per_token(timing: Timing, tokens: int) -> dict[str, float]:
    """The timing of a call divided by the tokens it reads."""
    return {name: seconds / tokens for name, seconds in timing.as_dict().items()}


def ratio_to_first(values: dict[int, float]) -> dict[int, str]:
    """Each value over that of the smallest key."""
    first = values[min(values)]
    return {key: f"{value / first:.2f}" for key, value in values.items()}


def show_costs(trained: dict[int, dict[str, Any]], streamed: dict[int, dict[str, Any]], title: str) -> None:
    """The table: a row for each length or position."""
    seconds = {length: row["seconds_token"]["median_seconds"] for length, row in trained.items()}
    memory = {length: row["activation_bytes_token"] for length, row in trained.items()}
    stream_seconds = {position: row["seconds_token"]["median_seconds"] for position, row in streamed.items()}
    of_first = [ratio_to_first(values) for values in (seconds, memory, stream_seconds)]
    rows = []
    for context in sorted(trained.keys() | streamed.keys()):
        row = [f"{context:,}", *["-"] * 8]
        if context in trained:
            row[1:6] = [
                str(trained[context]["batch"]),
                f"{seconds[context] * 1e6:.1f}",
                of_first[0][context],
                f"{memory[context] / 1e3:.1f}",
                of_first[1][context],
            ]
        if context in streamed:
            row[6:] = [
                f"{stream_seconds[context] * 1e3:.3f}",
                of_first[2][context],
                f"{streamed[context]['state_bytes'] / 1e3:.1f}",
            ]
        rows.append(row)
    columns = ["context", "batch", "training us a token", "x first", "KB a token", "x first"]
    show(title, [*columns, "streaming ms a token", "x first", "state KB"], rows)


def plot(trained: dict[int, dict[str, Any]], streamed: dict[int, dict[str, Any]], output: Path) -> None:
    """Three panels over the context: time of a trained token, its memory, time of a streamed token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = (
        "training: time of a token (us)",
        "training: memory of a token (KB)",
        "streaming: time of a token (ms)",
    )
    for panel, title, rows, scale in zip(
        panels, titles, (trained, trained, streamed), (1e6, 1e-3, 1e3), strict=True
    ):
        contexts = sorted(rows)
        if "memory" in title:
            panel.plot(
                contexts, [rows[context]["activation_bytes_token"] * scale for context in contexts], "o-"
            )
        else:
            times = [rows[context]["seconds_token"] for context in contexts]
            middle = [time["median_seconds"] * scale for time in times]
            below = [(time["median_seconds"] - time["fastest_seconds"]) * scale for time in times]
            above = [(time["slowest_seconds"] - time["median_seconds"]) * scale for time in times]
            panel.errorbar(contexts, middle, [below, above], fmt="o-", capsize=3)
        panel.set_title(title, fontsize=10)
        panel.set_xscale("log", base=2)
        panel.set_xticks(contexts, [f"{context:,}" for context in contexts])
        panel.set_xlabel("context (tokens)")
        panel.set_ylim(0, 1.15 * panel.get_ylim()[1])
        panel.grid(alpha=0.3)
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(output) as aside:
        figure.savefig(aside, dpi=120, format="png")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__.splitlines()[0], "long_context")
    parser.set_defaults(repeats=7)
    lengths, positions = [1024, 4096, 16384, 65536], [1024, 16384, 65536]
    parser.add_argument("--preset", default="tiny", help="of configs/model")
    parser.add_argument("--tokens", type=positive, default=65536, metavar="N", help="of a training step")
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        default=lengths,
        metavar="T",
        help="of the sequences trained on",
    )
    parser.add_argument(
        "--positions",
        type=positive,
        nargs="+",
        default=positions,
        metavar="T",
        help="where streaming is timed",
    )
    parser.add_argument("--streamed", type=positive, default=128, metavar="N", help="tokens streamed a call")
    parser.add_argument("--checkpointed", action="store_true", help="train with activation checkpointing")
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="CPU threads")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="where the picture goes; None: beside the JSON"
    )
    parser.add_argument("--quick", action="store_true", help="short contexts, to see that everything runs")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.lengths, options.positions = 256, [64, 256], [64, 256]
        options.streamed, options.repeats = 8, 2
    if unfit := [length for length in options.lengths if options.tokens % length]:
        parser.error(f"--tokens {options.tokens} is no multiple of --lengths {unfit[0]}")
    options.plot = options.plot or options.output.with_suffix(".png")
    return options


def run(options: argparse.Namespace) -> None:
    """Measure, print, draw and write."""
    torch.set_num_threads(options.threads)
    changes = {"layers": 2, "width": 32} if options.quick else {}
    config = load_model_preset(options.preset, vocab_size=256, context_length=max(options.lengths), **changes)
    trained, streamed = train(config, options), stream(config, options)
    size = f"L {config.layers}, C {config.width}"
    title = f"{options.preset} ({size}), {options.tokens:,} tokens a step, {options.threads} threads"
    show_costs(trained, streamed, title)
    plot(trained, streamed, options.plot)
    keys = ("preset", "tokens", "streamed", "checkpointed", "threads", "repeats", "quick")
    settings = {key: getattr(options, key) for key in keys}
    write_results({"settings": settings, "training": trained, "streaming": streamed}, options.output)


if __name__ == "__main__":
    try:
        run(parse())
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
