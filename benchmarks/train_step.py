"""A whole training step on the CPU, beside the matrix products alone and beside its peers.

    python benchmarks/train_step.py --profile

Rows, in interleaved rounds of one run, all with bfloat16 autocast and the same optimizer (`peers.py`):

- the GEMM floor, that is the same projections alone;
- SpikeGPT as the preset has it, without dropout, and with activation checkpointing;
- what spikes save, without dropout: checkpoints kept as counts of spikes or in float32, and in the variant
  spikegpt-driven the spikes that projections read, kept as bits or in bfloat16 (with the preset's dropout the
  residual stream is no count, and checkpoints stay in float32);
- Hugging Face's GPT-2 and RWKV-4 of the same size; SpikeGPT from SpikingJelly's multi-step LIF node and a
  loop over tokens.

The two that loop over tokens take up to a minute a step: they are timed once, after three steps of 16 tokens,
when the others are done. The peers have no dropout. "x slower" is against the row SpikeGPT, the preset as it
is.

Peak memory (`peers.step_memory`) and its growth in tokens and layers are those of the resident set, each in
a process of its own: "MB" is what a step adds to the model, "MB act." the part that gradients and moments
do not explain. Growth is that of the preset, and of checkpoints as counts, which have dropout 0.
"""

import argparse
import re
from functools import partial
from typing import Any

import torch
from common import Timing, arguments, in_own_process, measure, positive, random_tokens, show, write_results
from peers import MODELS, GemmFloor, MissingPeerError, TrainingStep, check_agreement, step_memory, vocab_size
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from spikescale.config import ModelConfig, load_model_preset
from spikescale.errors import UserError

FLOOR = "gemm"
TITLES = {
    FLOOR: "GEMM floor",
    "spikegpt": "SpikeGPT",
    "spikegpt-no-dropout": "SpikeGPT, dropout 0",
    "spikegpt-checkpointed": "SpikeGPT, checkpointed",
    "checkpointed-counts": "checkpointed, dropout 0, counts",
    "checkpointed-floats": "checkpointed, dropout 0, float32",
    "driven-bits": "driven, dropout 0, bits",
    "driven-numbers": "driven, dropout 0, bf16",
    "gpt2": "HF GPT-2",
    "rwkv": "HF RWKV-4",
    "spikingjelly": "SpikingJelly and loop",
}
LOOPING = ("rwkv", "spikingjelly")
# Weights that start as zeros are none after two steps.
WARM_UP = 3
PROFILED = 3
GROWTH_LENGTHS, GROWTH_LAYERS = (512, 1024, 2048, 4096), (6, 12, 24)
MEGA = 1e6


def build(rows: list[str], config: ModelConfig, tokens: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The rows that can run here, by name, and the reasons why the others cannot."""
    steps: dict[str, Any] = {}
    skipped = {}
    for name in rows:
        try:
            steps[name] = GemmFloor(config, tokens) if name == FLOOR else MODELS[name](config)
        except (
            MissingPeerError,
            ImportError,
        ) as error:  # transformers imports its models when they are named
            skipped[name] = " ".join(str(error).split())
    return steps, skipped


def time_steps(steps: dict[str, Any], options: argparse.Namespace, vocab: int) -> dict[str, Timing]:
    """The rounds, then the rows that loop over tokens."""
    tokens = random_tokens(options.batch, options.length, vocab)
    short = random_tokens(options.batch, min(options.length, 16), vocab)
    calls = {name: step if name == FLOOR else partial(step, tokens) for name, step in steps.items()}
    quick = {name: call for name, call in calls.items() if name not in LOOPING}
    for _ in range(WARM_UP - 1):
        for call in quick.values():
            call()
    timings = measure(quick, options.repeats) if quick else {}
    for name in [name for name in calls if name in LOOPING]:
        for _ in range(WARM_UP):
            steps[name](short)
        timings |= measure({name: calls[name]}, 1, warm_up=False)
    return {name: timings[name] for name in steps}


def summarise(
    steps: dict[str, Any],
    timings: dict[str, Timing],
    memory: dict[str, dict[str, int]],
    options: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """What the table and the JSON say of each row."""
    tokens = options.batch * options.length
    rates = {name: tokens / timing.median for name, timing in timings.items()}
    summary = {}
    for name, step in steps.items():
        row: dict[str, Any] = dict(memory.get(name, {}))
        if isinstance(step, TrainingStep):
            row["parameters"] = step.count_parameters()
        if name in timings:
            row |= timings[name].as_dict()
            row["repeats"] = 1 if name in LOOPING else options.repeats
            row["tokens_per_second"] = rates[name]
            row["share_of_floor"] = rates[name] / rates[FLOOR] if FLOOR in rates else None
            row["times_slower_than_spikegpt"] = (
                rates["spikegpt"] / rates[name] if "spikegpt" in rates else None
            )
            if isinstance(step, GemmFloor):
                row["operations_per_second"] = step.operations / timings[name].median
        summary[name] = row
    return summary


def show_steps(summary: dict[str, dict[str, Any]], skipped: dict[str, str], title: str) -> None:
    """The main table, and below it the rows that are missing."""
    columns = ["", "M weights", "ms: median (range)", "tokens/s", "of the floor", "x slower", "MB", "MB act."]
    rows = []
    for name, row in summary.items():
        timing = None
        if "median_seconds" in row:
            timing = Timing(row["median_seconds"], row["fastest_seconds"], row["slowest_seconds"])
        rows.append(
            [
                TITLES[name] + (", 1 step" if row.get("repeats") == 1 else ""),
                formatted(row.get("parameters"), "{:.1f}", MEGA),
                timing.milliseconds() if timing else "-",
                formatted(row.get("tokens_per_second"), "{:.0f}"),
                formatted(row.get("share_of_floor"), "{:.2f}"),
                formatted(row.get("times_slower_than_spikegpt"), "{:.2f}"),
                formatted(row.get("step_bytes"), "{:.0f}", MEGA),
                formatted(row.get("activation_bytes"), "{:.0f}", MEGA),
            ]
        )
    show(title, columns, rows)
    for name, reason in skipped.items():
        print(f"{TITLES[name]}: skipped: {reason}")


def formatted(value: float | None, style: str, unit: float = 1) -> str:
    """`value / unit` in `style`, `-` for None."""
    return "-" if value is None else style.format(value / unit)


def measure_growth(config: ModelConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak bytes of activations at batch 1 by length, then by depth, without and with checkpointing.

    Checkpoints are counts of spikes, for which dropout is 0.
    """
    points = [(length, config.layers) for length in options.growth_lengths]
    points += [(options.length, layers) for layers in options.growth_layers]
    growth = []
    for length, layers in dict.fromkeys(points):
        deep = config.model_copy(update={"layers": layers})
        kept, recomputed = (
            in_own_process(step_memory, name, deep, 1, length, options.threads)["activation_bytes"]
            for name in ("spikegpt", "checkpointed-counts")
        )
        growth.append({"length": length, "layers": layers, "bytes": kept, "checkpointed_bytes": recomputed})
    return growth


def show_growth(growth: list[dict[str, Any]]) -> None:
    """The table of `measure_growth`."""
    rows = [
        [
            f"T {point['length']}, L {point['layers']}",
            f"{point['bytes'] / MEGA:.0f}",
            f"{point['bytes'] / point['length'] / point['layers'] / 1e3:.1f}",
            f"{point['checkpointed_bytes'] / MEGA:.0f}",
            f"{point['checkpointed_bytes'] / point['length'] / point['layers'] / 1e3:.1f}",
        ]
        for point in growth
    ]
    columns = ["", "MB", "KB a token and layer", "checkpointed as counts, dropout 0: MB"]
    columns.append("KB a token and layer")
    show("Peak memory of activations, batch 1", columns, rows)


HEAD_AND_LOSS = "head and loss"
OPTIMIZER = "optimizer and clipping"
PYTHON = "Python and autograd engine"
OTHER = "other"
SCOPES = {"head": HEAD_AND_LOSS, "loss": HEAD_AND_LOSS, "optimizer": OPTIMIZER}
# The first pattern that is found in the name of an operator, or else of one that it was called by.
GROUPS = {
    "linear": r"^aten::(mm|addmm|bmm|matmul|linear)$|mkldnn",
    "wkv": r"wkv",
    "lif, norm, dropout": r"lif|layer_?norm|dropout|bernoulli",
    "token mix": r"token_mix|lerp|^aten::cat$",
    "activations": r"squared_relu|sigmoid|relu|threshold_backward|^aten::(pow|square)$",
    "casts, copies, sums of gradients": r"^aten::(_to_copy|copy_|clone|fill_|zero_|add_)$|accumulategrad",
}


def profile_step(step: TrainingStep, tokens: torch.Tensor) -> dict[str, Any]:
    """Where the time of a step goes: seconds by group, and the operators that take the most of it."""
    head = step.model.get_submodule("head")
    scopes = []

    def enter(*_: Any) -> None:
        scopes.append(record_function("head"))
        scopes[-1].__enter__()

    def leave(*_: Any) -> None:
        scopes.pop().__exit__(None, None, None)

    hooks = [head.register_forward_pre_hook(enter), head.register_forward_hook(leave)]
    step(tokens)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED):
            step(tokens)
    for hook in hooks:
        hook.remove()
    events = [event for event in profiler.events() if not event.is_async]
    # A node of the backward graph carries the number of the operator that made it.
    scope_of_number = {
        event.sequence_nr: scope
        for event in events
        if event.sequence_nr >= 0 and (scope := scope_of(event)) is not None
    }
    groups = dict.fromkeys([*GROUPS, HEAD_AND_LOSS, OPTIMIZER, PYTHON, OTHER], 0.0)
    operators: dict[str, float] = {}
    for event in events:
        seconds = event.self_cpu_time_total / 1e6 / PROFILED
        groups[group_of(event, scope_of_number)] += seconds
        operators[event.name] = operators.get(event.name, 0.0) + seconds
    slowest = sorted(operators, key=lambda name: -operators[name])[:25]
    return {
        "seconds": sum(groups.values()),
        "groups": groups,
        "operators": {name: operators[name] for name in slowest},
    }


def callers(event: FunctionEvent) -> list[FunctionEvent]:
    """The event itself and those it is part of, from the inside out."""
    chain = []
    current: FunctionEvent | None = event
    while current is not None:
        chain.append(current)
        current = current.cpu_parent
    return chain


def scope_of(event: FunctionEvent) -> str | None:
    """The group of the scope that the event is in, if that decides it."""
    return next((SCOPES[caller.name] for caller in callers(event) if caller.name in SCOPES), None)


def group_of(event: FunctionEvent, scope_of_number: dict[int, str]) -> str:
    """One of GROUPS, or of the groups beside them."""
    if (scope := scope_of(event)) is not None:
        return scope
    chain = callers(event)
    for caller in chain:
        if "Backward" in caller.name and caller.sequence_nr in scope_of_number:
            return scope_of_number[caller.sequence_nr]
    if event.name in ("forward", "backward"):
        return PYTHON
    for caller in chain:
        for group, pattern in GROUPS.items():
            if re.search(pattern, caller.name, re.IGNORECASE):
                return group
    return OTHER


def show_profile(profiled: dict[str, Any]) -> None:
    """The table of `profile_step`."""
    total = profiled["seconds"]
    rows = [
        [group, f"{seconds * 1e3:.1f}", f"{seconds / total:.1%}"]
        for group, seconds in sorted(profiled["groups"].items(), key=lambda item: -item[1])
    ]
    rows.append(["all", f"{total * 1e3:.1f}", "100.0%"])
    show("Time of a SpikeGPT step, profiled", ["", "ms", "share"], rows)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__.splitlines()[0], "train_step")
    parser.set_defaults(repeats=7, growth_lengths=GROWTH_LENGTHS, growth_layers=GROWTH_LAYERS)
    parser.add_argument("--preset", default="46m", help="of configs/model")
    parser.add_argument("--batch", type=positive, default=4, metavar="B", help="sequences a step")
    parser.add_argument("--length", type=positive, default=1024, metavar="T", help="tokens a sequence")
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="CPU threads")
    parser.add_argument(
        "--rows", nargs="+", choices=TITLES, default=list(TITLES), metavar="ROW", help=", ".join(TITLES)
    )
    parts = ["time", "memory", "growth"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what is measured")
    parser.add_argument("--profile", action="store_true", help="also where the time of a step goes")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.length, options.repeats = 2, 32, 2
        options.growth_lengths, options.growth_layers = (64,), (2,)
    return options


def run(options: argparse.Namespace) -> None:
    """Check, measure, print and write."""
    torch.set_num_threads(options.threads)
    changes = {"layers": 2, "width": 32} if options.quick else {}
    config = load_model_preset(options.preset, vocab_size=256, context_length=options.length, **changes)
    settings = {key: getattr(options, key) for key in ("preset", "batch", "length", "threads", "quick")}
    results: dict[str, Any] = {"settings": settings | {"precision": "bfloat16"}}
    steps, skipped = build(options.rows, config, options.batch * options.length)
    results["skipped"] = skipped
    if "spikingjelly" in steps:
        results["tokens_that_disagree"] = check_agreement(config)
    memory = {}
    if "memory" in options.parts:
        for name in [name for name in steps if name != FLOOR]:
            shape = (options.batch, options.length, options.threads)
            memory[name] = in_own_process(step_memory, name, config, *shape)
    timings = time_steps(steps, options, vocab_size(config)) if "time" in options.parts else {}
    results["rows"] = summarise(steps, timings, memory, options)
    size = f"L {config.layers}, C {config.width}, B {options.batch}, T {options.length}"
    title = f"Training step, {options.preset}: {size}, bfloat16, {options.threads} threads"
    show_steps(results["rows"], skipped, title)
    if options.profile and "spikegpt" in steps:
        tokens = random_tokens(options.batch, options.length, vocab_size(config))
        results["profile"] = profile_step(steps["spikegpt"], tokens)
        show_profile(results["profile"])
    if "growth" in options.parts:
        results["growth"] = measure_growth(config, options)
        show_growth(results["growth"])
    write_results(results, options.output)


if __name__ == "__main__":
    try:
        run(parse())
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
