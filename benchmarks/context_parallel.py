"""One long sequence on one process and divided over ranks: time of a training step, memory of a rank.

    python benchmarks/context_parallel.py

A step is forward, loss, backward and the averaging of gradients over the ranks, with bfloat16 autocast over
float32 weights and one thread a rank. Ranks are processes of this machine: with at least as many idle cores
as ranks, the time shows what handing states on costs. Memory is what a step adds at its peak to a process
that holds the model and its gradients. Losses of divided and whole sequences must agree, else nothing is
reported.
"""

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from typing import Any

import torch
from common import (
    arguments,
    measure,
    peak_bytes,
    positive,
    random_tokens,
    reset_peak,
    resident_bytes,
    show,
    write_results,
)
from peers import vocab_size

from spikescale.config import ModelConfig, load_model_preset
from spikescale.errors import UserError
from spikescale.model import SpikeGPT, language_model_loss
from spikescale.parallel import Layout
from spikescale.parallel.context import ContextRelay, part_of

TIMEOUT = timedelta(minutes=10)


def run_rank(
    rank: int, ranks: int, meeting: str, config: ModelConfig, length: int, repeats: int, checkpointed: bool
) -> dict[str, float]:
    """Timings, memory and mean loss of one rank of `ranks`, which meet at the file `meeting`."""
    torch.set_num_threads(1)
    if ranks > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=TIMEOUT
        )
    layout = Layout(rank, ranks, context=ranks)
    relay = ContextRelay.of(layout)
    model = SpikeGPT(config)
    model.activation_checkpointing = checkpointed
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            if parameter.dim() == 2:  # the initial projections are zeros, with which no neuron fires
                parameter.normal_(0, 2 / parameter.shape[1] ** 0.5, generator=generator)

    def step(tokens: torch.Tensor) -> float:
        own = part_of(tokens, layout)
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = model(own[:, :-1], relay=relay)
        loss, cross_entropy = language_model_loss(logits, own[:, 1:])
        del logits
        (loss / ranks).backward()
        if ranks > 1:
            torch.distributed.all_reduce(cross_entropy)
            for parameter in model.parameters():
                torch.distributed.all_reduce(parameter.grad)
        model.zero_grad(set_to_none=False)
        return float(cross_entropy) / ranks

    step(random_tokens(1, 4 * ranks, vocab_size(config)))
    tokens = random_tokens(1, length, vocab_size(config))
    before = resident_bytes()
    reset_peak()
    loss = step(tokens)
    memory = peak_bytes() - before
    timing = measure({"step": lambda: step(tokens)}, repeats, warm_up=False)["step"]
    if relay is not None:
        relay.finish()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return {"loss": loss, "peak_bytes": memory, **timing.as_dict()}


def run_ranks(ranks: int, *options: Any) -> dict[str, Any]:
    """The slowest rank's times, every rank's memory, the loss."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "omegaconf"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(ranks, mp_context=context) as pool:
        futures = [pool.submit(run_rank, rank, ranks, f"{folder}/meeting", *options) for rank in range(ranks)]
        try:
            results = [future.result() for future in futures]
        except BrokenProcessPool:
            raise UserError(f"{ranks} rank(s): a process was killed; is there enough memory?") from None
    slowest = max(results, key=lambda result: result["median_seconds"])
    times = {key: slowest[key] for key in ("median_seconds", "fastest_seconds", "slowest_seconds")}
    return {"loss": results[0]["loss"], "peak_bytes": [result["peak_bytes"] for result in results], **times}


def compare(config: ModelConfig, options: argparse.Namespace) -> dict[int, dict[int, dict[str, Any]]]:
    """Results by length of the sequence and number of ranks."""
    results: dict[int, dict[int, dict[str, Any]]] = {}
    for length in options.lengths:
        rows = results[length] = {}
        for ranks in (1, *options.ranks):
            rows[ranks] = run_ranks(ranks, config, length, options.repeats, options.checkpointed)
            difference = abs(rows[ranks]["loss"] / rows[1]["loss"] - 1)
            if not difference < 1e-3:
                raise UserError(f"the loss of {ranks} ranks is off by {difference:.1e}; nothing is reported")
    return results


def rows_of(results: dict[int, dict[int, dict[str, Any]]]) -> list[list[str]]:
    """The table: a row for each length and number of ranks."""
    rows = []
    for length, by_ranks in results.items():
        alone = by_ranks[1]
        for ranks, row in by_ranks.items():
            speedup = alone["median_seconds"] / row["median_seconds"]
            memory = max(row["peak_bytes"])
            rows.append(
                [
                    f"{length:,}",
                    str(ranks),
                    f"{row['median_seconds']:.2f}"
                    f" ({row['fastest_seconds']:.2f} to {row['slowest_seconds']:.2f})",
                    f"{length / row['median_seconds']:,.0f}",
                    f"{speedup:.2f}",
                    f"{memory / 1e6:,.0f}",
                    f"{memory / max(alone['peak_bytes']):.2f}",
                ]
            )
    return rows


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__.splitlines()[0], "context_parallel")
    parser.set_defaults(repeats=5)
    parser.add_argument("--preset", default="tiny", help="of configs/model")
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        default=[4096, 16384, 65536],
        metavar="T",
        help="tokens of a sequence",
    )
    parser.add_argument(
        "--ranks", type=positive, nargs="+", default=[2], metavar="P", help="that divide it, beside one"
    )
    parser.add_argument("--checkpointed", action="store_true", help="train with activation checkpointing")
    parser.add_argument("--quick", action="store_true", help="short sequences, to see that everything runs")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.repeats = [64], 2
    for ranks in options.ranks:
        if unfit := [length for length in options.lengths if length % ranks]:
            parser.error(f"--lengths {unfit[0]} is no multiple of --ranks {ranks}")
    return options


def run(options: argparse.Namespace) -> None:
    """Measure, print and write."""
    changes = {"layers": 3, "width": 32} if options.quick else {}
    config = load_model_preset(options.preset, vocab_size=256, context_length=max(options.lengths), **changes)
    results = compare(config, options)
    columns = ["tokens", "ranks", "seconds a step", "tokens/s", "speed-up", "MB a rank", "x one process"]
    title = f"{options.preset} (L {config.layers}, C {config.width}), one sequence, one thread a rank"
    show(title, columns, rows_of(results))
    keys = ("preset", "lengths", "ranks", "checkpointed", "repeats", "quick")
    settings = {key: getattr(options, key) for key in keys}
    write_results({"settings": settings, "rows": results}, options.output)


if __name__ == "__main__":
    try:
        run(parse())
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
