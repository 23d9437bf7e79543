"""A plan as tables for people and as JSON."""

import json
import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from spikescale.planning import parameters as of_model
from spikescale.planning.choice import USABLE, Candidate
from spikescale.planning.devices import GIB
from spikescale.planning.memory import MemoryPlan, Workload
from spikescale.planning.request import Request
from spikescale.planning.throughput import Throughput

COLUMNS = 120
PARTS = {  # of a phase, and how the table calls them
    "baseline": "base",
    "weights": "weights",
    "casts": "casts",
    "optimizer": "optim",
    "gradients": "grads",
    "partition": "part",
    "activations": "activ",
    "logits": "logits",
    "buffers": "buffers",
    "temporary": "temp",
    "gloo": "gloo",
}


def show(request: Request, found: list[Candidate], chosen: Candidate | None) -> None:
    """Print the tables and the recommendation."""
    console = Console(
        highlight=False, soft_wrap=False, emoji=False, width=None if sys.stdout.isatty() else COLUMNS
    )
    for line in _introduction(request):
        console.print(line, markup=False)
    console.print(_memory_table(request, found))
    console.print(_breakdown(request, chosen or min(found, key=lambda c: c.memory.device_bytes)))
    for line in _recommendation(request, found, chosen):
        console.print(line, markup=False)


def _introduction(request: Request) -> list[str]:
    work, device, model = request.workload, request.device, request.workload.model
    peak = device.matrix_peaks["bfloat16" if work.compute == 2 else "float32"]
    groups = f"{work.ranks} rank(s)"
    if work.parallel.tensor > 1:
        groups += f", {work.parallel.tensor} share a model"
    if work.parallel.context > 1:
        groups += f", {work.parallel.context} share a sequence"
    checkpointing = "blocks recomputed" if work.train.activation_checkpointing else "activations kept"
    return [
        f"{model.preset or model.variant}: {model.layers} layers, width {model.width},"
        f" {of_model.vocabulary(model)} symbols, {of_model.count(model) / 1e6:.1f}M parameters"
        f" ({of_model.count_projections(model) / 1e6:.1f}M in projections)",
        f"{groups}; {work.micro_batch} x {work.accumulation} sequences of {model.context_length} tokens"
        f" a rank and step, {work.train.precision}, {checkpointing}"
        + (", loss fused with the head" if work.fused_loss else ""),
        f"{device.name}: {request.memory / GIB:.1f} GiB, of which {USABLE:.0%} count as usable;"
        f" {peak / 1e12:.4g} TFLOP/s at {device.efficiency:.0%}, memory {device.bandwidth / 1e9:.0f} GB/s,"
        f" link {device.link / 1e9:.0f} GB/s ({device.source})",
        "",
    ]


def _memory_table(request: Request, found: list[Candidate]) -> Table:
    table = Table(title="Peak of one rank, GiB, and speed by ZeRO stage", title_justify="left")
    for column in ("stage", "device", "host", "at", "fits", "tok/s", "matmul", "memory", "link"):
        table.add_column(column, justify="left" if column in ("stage", "at", "fits") else "right")
    cost = request.tokens is not None
    if cost:
        table.add_column("days", justify="right")
    if cost and request.price:
        table.add_column("cost", justify="right")
    for candidate in found:
        memory, speed = candidate.memory, candidate.throughput
        row = [
            candidate.name,
            f"{memory.device_bytes / GIB:.2f}",
            f"{memory.host_bytes / GIB:.2f}" if memory.host_bytes else "-",
            "all together" if memory.on_cpu else memory.peak.name,
            "yes" if candidate.fits else "no",
            compact(speed.tokens_per_second),
            *(f"{part / speed.seconds:.0%}" for part in (speed.matrices, speed.traffic)),
            f"{(speed.communication + speed.offload) / speed.seconds:.0%}",
        ]
        if request.tokens is not None:
            days = speed.days(request.tokens)
            row.append(f"{days:.3g}")
            if request.price:
                row.append(f"{cost_of(request, days):,.0f}")
        table.add_row(*row)
    return table


def _breakdown(request: Request, candidate: Candidate) -> Table:
    table = Table(title=f"Stage {candidate.name}, one rank, GiB by phase", title_justify="left")
    table.add_column("phase", no_wrap=True)
    for heading in PARTS.values():
        table.add_column(heading, justify="right")
    table.add_column("device", justify="right")
    table.add_column("host", justify="right")
    for phase in candidate.memory.phases:
        both = dict(phase.device)
        if request.workload.on_cpu:
            for key, value in phase.host.items():
                both[key] = both.get(key, 0) + value
        cells = [f"{both[part] / GIB:.2f}" if both.get(part) else "-" for part in PARTS]
        total = phase.device_bytes + (phase.host_bytes if request.workload.on_cpu else 0)
        table.add_row(phase.name, *cells, f"{total / GIB:.2f}", f"{phase.host_bytes / GIB:.2f}")
    return table


def _recommendation(request: Request, found: list[Candidate], chosen: Candidate | None) -> list[str]:
    if chosen is None:
        least = min(found, key=lambda c: c.memory.device_bytes)
        needed = least.memory.device_bytes / USABLE / GIB
        lines = [f"Nothing fits. Stage {least.name} needs least: devices of {needed:.1f} GiB."]
        return lines + [f"  try {advice}" for advice in _advice(request.workload)]
    lines = [f"Recommended: stage {chosen.name}. In the run's file:", ""]
    for section, settings in chosen.settings().items():
        lines.append(f"{section}:")
        lines += [f"  {key}: {_yaml(value)}" for key, value in settings.items()]
    lines.append("")
    if request.tokens is not None:
        days = chosen.throughput.days(request.tokens)
        price = (
            f", {cost_of(request, days):,.0f} at {request.price:g} a device and hour" if request.price else ""
        )
        lines.append(f"{compact(request.tokens)} tokens: {days:.3g} days{price}")
    return lines


def _advice(workload: Workload) -> list[str]:
    advice = []
    if not workload.train.activation_checkpointing:
        advice.append("--checkpointing")
    if workload.micro_batch > 1:
        advice.append(f"--micro-batch {workload.micro_batch // 2}")
    if workload.compute > 2:
        advice.append("--precision bfloat16")
    return [*advice, f"--gpus {2 * workload.ranks}"]


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def cost_of(request: Request, days: float) -> float:
    """Price of all devices for `days`."""
    assert request.price is not None
    return days * 24 * request.workload.ranks * request.price


def compact(value: float) -> str:
    """`1.23M`."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def as_json(request: Request, found: list[Candidate], chosen: Candidate | None) -> dict[str, Any]:
    """Everything that `show` prints, and every phase of every candidate, in bytes and seconds."""
    work = request.workload
    return {
        "parameters": of_model.count(work.model),
        "projections": of_model.count_projections(work.model),
        "model": json.loads(work.model.model_dump_json()),
        "ranks": work.ranks,
        "tensor": work.parallel.tensor,
        "context_ranks": work.parallel.context,
        "device": asdict(request.device),
        "memory_bytes": request.memory,
        "host_memory_bytes": request.host_memory,
        "usable_share": USABLE,
        "tokens": request.tokens,
        "candidates": [_candidate_json(request, candidate) for candidate in found],
        "recommended": None if chosen is None else {"stage": chosen.name, "settings": chosen.settings()},
    }


def _candidate_json(request: Request, candidate: Candidate) -> dict[str, Any]:
    days = None if request.tokens is None else candidate.throughput.days(request.tokens)
    return {
        "stage": candidate.name,
        "fits": candidate.fits,
        **_memory_json(candidate.memory),
        **_throughput_json(candidate.throughput),
        "days": days,
        "cost": None if days is None or not request.price else cost_of(request, days),
    }


def _memory_json(memory: MemoryPlan) -> dict[str, Any]:
    phases = [{"name": p.name, "device": p.device, "host": p.host} for p in memory.phases]
    return {
        "device_bytes": memory.device_bytes,
        "host_bytes": memory.host_bytes,
        "disk_bytes": memory.disk,
        "peak_phase": memory.peak.name,
        "phases": phases,
    }


def _throughput_json(throughput: Throughput) -> dict[str, Any]:
    return {
        "tokens_per_second": throughput.tokens_per_second,
        "step_seconds": throughput.seconds,
        "matrix_seconds": throughput.matrices,
        "traffic_seconds": throughput.traffic,
        "communication_seconds": throughput.communication,
        "offload_seconds": throughput.offload,
        "link_bytes": throughput.link_bytes,
    }
