"""What spikes in front of every projection cost in bits a byte, and what makes the gap smaller.

    python benchmarks/driven_gap.py train --data data/shakespeare-byte --runs runs/gap --seeds 0 1
    python benchmarks/driven_gap.py report --data data/shakespeare-byte --runs runs/gap

`train` pretrains each attempt at the same budget, one after another, and skips those that are finished: it
may be killed and called again. `report` measures firing rates and energy of the finished ones on the test
split, and writes benchmarks/results/driven_gap.json and .png. What it measured before it takes from that
file only where budget, data and the attempt's settings are the same; runs that were trained with others are
left out, and said so. `--lock FILE` has every run wait for that file's lock.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import ROOT, command_line, described_data, described_model, shown_path, write_results

from spikescale.config import RunConfig, load_config
from spikescale.data_pipeline.manifest import load_manifest
from spikescale.data_pipeline.stream import split_tokens
from spikescale.energy import PRICES, count_operations, summarise
from spikescale.evaluation.language_model import evaluate_tokens
from spikescale.files import written_aside
from spikescale.model.store import find_model_folder, load_model_folder

RESULTS = ROOT / "benchmarks" / "results" / "driven_gap.json"
TINY = ROOT / "configs" / "run" / "tiny.yaml"
ENERGY_TOKENS = 16_384  # of the test split, over which operations are counted
# The budget of configs/run/ablation.yaml, which compares the variants.
BUDGET = {
    "train.steps": 250,
    "train.batch_size": 8,
    "train.optimizer": "adamw",
    "train.weight_decay": 0.1,
    "train.lr": 2e-3,
    "train.min_lr": 1e-4,
    "train.warmup_steps": 25,
    "train.schedule": "wsd",
    "train.decay_fraction": 0.3,
    "train.precision": "auto",
    "train.threads": 1,
    "train.evaluate_every": 0,
    "train.save_every": 50,
    "train.final_evaluation_tokens": 256,  # `report` evaluates
    "train.sample_count": 0,
    "mlflow.enabled": "false",
    "zero.stage": 0,
}
# Of `train`, what decides the weights and is the same for all attempts: a run may be another program's.
DECISIVE = (
    *("steps", "batch_size", "optimizer", "weight_decay", "lr", "min_lr", "warmup_steps"),
    *("schedule", "decay_fraction", "seed"),
)
NAME_HEIGHT = 0.022  # of a name in the picture, in bits a byte
TEACHER = "{teacher}"  # the run `rwkv` with the same seed


def driven(**neuron: object) -> dict[str, object]:
    """The driven variant with settings of its neurons."""
    return {"model.variant": "spikegpt-driven"} | {f"model.neuron.{key}": v for key, v in neuron.items()}


YES = "true"
# Currents of equal size at a threshold that they reach: without it, neurons hardly fire at first.
BALANCED = {"v_threshold": 0.5, "normalise_current": YES}
# What each attempt changes, by name; the first three are what the others are held against.
ATTEMPTS: dict[str, dict[str, object]] = {
    "rwkv": {"model.variant": "rwkv", "model.binary_embedding": "false"},
    "spikegpt": {"model.variant": "spikegpt"},
    "driven": driven(),
    "threshold 0.5": driven(v_threshold=0.5),
    "signed": driven(**BALANCED, signed=YES),
    "signed, tau 1": driven(**BALANCED, signed=YES, tau=1.0),
    "normalised": driven(**BALANCED),
    "signed, 2 bits, tau 1": driven(**BALANCED, signed=YES, bits=2, tau=1.0),
    "learnt threshold": driven(learn_threshold=YES),
    "signed, distilled": {**driven(**BALANCED, signed=YES), "train.distill_from": TEACHER},
    "signed, learnt": driven(**BALANCED, signed=YES, learn_tau=YES, learn_threshold=YES),
    "signed, 2 bits, tau 1, learnt threshold": driven(
        **BALANCED, signed=YES, bits=2, tau=1.0, learn_threshold=YES
    ),
    "signed, tau 1, distilled": {**driven(**BALANCED, signed=YES, tau=1.0), "train.distill_from": TEACHER},
    "signed, 2 bits, tau 1, distilled": {
        **driven(**BALANCED, signed=YES, bits=2, tau=1.0),
        "train.distill_from": TEACHER,
    },
    "signed, 4 bits, tau 1, distilled": {
        **driven(v_threshold=0.2, normalise_current=YES, signed=YES, bits=4, tau=1.0),
        "train.distill_from": TEACHER,
    },
    "2 bits": driven(**BALANCED, bits=2),
    "learnt tau": driven(learn_tau=YES),
    "signed, 4 bits, tau 1": driven(v_threshold=0.2, normalise_current=YES, signed=YES, bits=4, tau=1.0),
    "normalised, threshold 1": driven(normalise_current=YES),
    "heaviside-rwkv": {"model.variant": "heaviside-rwkv"},
    "spikegpt-b": {"model.variant": "spikegpt-b"},
    "threshold 0.25": driven(v_threshold=0.25),
    "signed, threshold 1": driven(signed=YES),
    "soft reset": driven(soft_reset=YES),
    "surrogate 0.5": driven(surrogate_alpha=0.5),
    "distilled": {**driven(), "train.distill_from": TEACHER},
    "float embedding": {**driven(), "model.binary_embedding": "false"},
}


def main() -> int:
    """Train or report, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("train", "report"))
    parser.add_argument("--data", type=Path, required=True, help="prepared data")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--attempts", nargs="+", default=list(ATTEMPTS), choices=list(ATTEMPTS))
    parser.add_argument("--lock", type=Path, help="file whose lock is held while training")
    parser.add_argument("--hold", type=float, default=590, help="seconds that the lock is held at most")
    arguments = parser.parse_args()
    return train(arguments) if arguments.what == "train" else report(arguments)


def train(arguments: argparse.Namespace) -> int:
    """Pretrain what is not finished: all attempts with the first seed, then with the next."""
    waiting = [(seed, name) for seed in arguments.seeds for name in arguments.attempts]
    failed, longest = [], 0.0
    while waiting:
        with locked(arguments.lock):
            held, first = time.monotonic(), True  # one at least, however long they take
            while waiting and (first or time.monotonic() - held + longest < arguments.hold):
                first = False
                seed, name = waiting.pop(0)
                began = time.monotonic()
                if not train_one(arguments, name, seed):
                    failed.append(f"{name}, seed {seed}")
                longest = max(longest, time.monotonic() - began)
        time.sleep(1)  # so that someone else who waits for the lock has it first
    print(f"failed: {', '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0


def train_one(arguments: argparse.Namespace, name: str, seed: int) -> bool:
    """Whether the attempt is trained, now or before."""
    run = run_name(name, seed)
    done = arguments.runs / run / "done"
    if done.exists():
        return True
    teacher = arguments.runs / run_name("rwkv", seed)
    if TEACHER in ATTEMPTS[name].values() and not (teacher / "done").exists():
        print(f"{run}: its teacher, {teacher}, is not trained", flush=True)
        return False
    words = words_of(arguments, name, seed)
    print(f"{run} ...", flush=True)
    ended = subprocess.run(
        [sys.executable, "launch/pretrain.py", "--config", "configs/run/tiny.yaml", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    if ended.returncode:
        print(f"{run}: exit code {ended.returncode}", flush=True)
        return False
    done.touch()
    return True


def words_of(arguments: argparse.Namespace, name: str, seed: int) -> list[str]:
    """What an attempt changes in configs/run/tiny.yaml."""
    changes = {"name": run_name(name, seed), "output": arguments.runs, "data.path": arguments.data}
    changes |= {"train.seed": seed, "data.seed": seed, **BUDGET, **ATTEMPTS[name]}
    teacher = arguments.runs / run_name("rwkv", seed)
    return [f"{key}={teacher if value == TEACHER else value}" for key, value in changes.items()]


def report(arguments: argparse.Namespace) -> int:
    """Measure what is finished; write the JSON, the picture, and a table in Markdown to standard output."""
    setup = {
        "budget": BUDGET,
        "energy_tokens": ENERGY_TOKENS,
        "prices": "45nm-float32",
        "data": described_data(arguments.data),
    }
    attempts = still_valid(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}, setup)
    strange = 0
    for name in arguments.attempts:
        for seed in arguments.seeds:
            known = attempts.setdefault(name, {"settings": ATTEMPTS[name], "seeds": {}})
            folder = arguments.runs / run_name(name, seed)
            if not (folder / "done").exists() or str(seed) in known["seeds"]:
                continue
            if other := difference(folder, load_config(TINY, words_of(arguments, name, seed))):
                print(f"{folder.name}: left out: {other}", file=sys.stderr, flush=True)
                strange += 1
                continue
            print(f"measuring {folder.name} ...", file=sys.stderr, flush=True)
            known["seeds"][str(seed)] = measured(folder, arguments.data)
    attempts = {name: found for name, found in attempts.items() if found["seeds"]}
    write_results({"attempts": attempts, **setup, "command": command(arguments)}, RESULTS)
    if {"rwkv", "driven"} <= attempts.keys():
        print(table(attempts))
    if attempts:
        draw(attempts, RESULTS.with_suffix(".png"))
    return 1 if strange else 0


def still_valid(results: dict[str, Any], setup: dict[str, Any]) -> dict[str, Any]:
    """Of earlier results the attempts that are what they would be now; a line for what is dropped."""
    earlier = results.get("attempts", {})
    for key, value in setup.items():
        if earlier and results.get(key) != value:
            print(f"{RESULTS.name}: of another {key}; everything is measured again", file=sys.stderr)
            return {}
    kept = {name: found for name, found in earlier.items() if found["settings"] == ATTEMPTS.get(name)}
    for name in earlier.keys() - kept.keys():
        print(f"{RESULTS.name}: {name} had other settings; it is measured again", file=sys.stderr)
    return kept


def difference(folder: Path, wanted: RunConfig) -> str:
    """How the settings that a run was trained with differ from those wanted; empty: not at all."""
    found = load_config(folder / "config.yaml")
    places = {"preset", "vocab_size", "backend"}  # filled in, or of no influence
    pairs = [(f"train.{key}", getattr(found.train, key), getattr(wanted.train, key)) for key in DECISIVE]
    pairs.append(("data.seed", found.data.seed, wanted.data.seed))
    pairs.append(("a teacher", found.train.distill_from is not None, wanted.train.distill_from is not None))
    ours = wanted.model.model_dump(exclude=places)
    pairs += [
        (f"model.{key}", value, ours[key]) for key, value in found.model.model_dump(exclude=places).items()
    ]
    return "; ".join(f"{key} was {a}, not {b}" for key, a, b in pairs if a != b)


def command(arguments: argparse.Namespace) -> str:
    """The command line; folders outside the project by their last part."""
    words = ["report", "--data", shown_path(arguments.data), "--runs", shown_path(arguments.runs)]
    words += ["--seeds", *map(str, arguments.seeds)]
    if arguments.attempts != list(ATTEMPTS):
        words += ["--attempts", *arguments.attempts]
    return command_line("driven_gap.py", words)


def measured(folder: Path, data: Path) -> dict[str, object]:
    """Bits a byte on the whole test split; operations and energy a token on its first tokens."""
    loaded = load_model_folder(find_model_folder(folder))
    manifest = load_manifest(data)
    tokens, totals = split_tokens(manifest, "test"), manifest.totals("test")
    nats, scored = evaluate_tokens(
        loaded.model, tokens, context_length=loaded.config.context_length, eos_id=loaded.tokenizer.eos_id
    )
    parts = count_operations(
        loaded.model, torch.as_tensor(tokens[:ENERGY_TOKENS]), context_length=loaded.config.context_length
    )
    found = summarise(parts, PRICES["45nm-float32"])
    rates = [part.rate for part in parts if part.kind == "neuron" and part.layer.startswith("block")]
    return {
        "bits_per_byte": nats / math.log(2) / totals.bytes,
        "tokens": scored,
        "spike_rate": found.spike_rate,
        "silent_neuron_layers": sum(rate == 0 for rate in rates),
        "neuron_layers": len(rates),
        "microjoules": found.energy / 1e6,
        "projection_ratio": found.projection_ratio,
        "whole_ratio": found.whole_ratio,
        "parameters": loaded.model.count_parameters(),
        "weights_sha256": described_model(folder)["weights_sha256"],
    }


def means(found: dict[str, Any], key: str) -> list[float]:
    """A figure of all seeds."""
    return [seed[key] for seed in found["seeds"].values() if seed[key] is not None]


def table(attempts: dict[str, Any]) -> str:
    """The attempts in Markdown, the best first."""
    rwkv, plain = (statistics.mean(means(attempts[name], "bits_per_byte")) for name in ("rwkv", "driven"))
    lines = [
        "| attempt | seeds | test bits a byte | of the gap to rwkv closed | spike rate | silent layers"
        " | uJ a token | projections | whole model |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(attempts, key=lambda name: statistics.mean(means(attempts[name], "bits_per_byte")))
    for name in order:
        found = attempts[name]
        bits, rate = means(found, "bits_per_byte"), means(found, "spike_rate")
        mean = statistics.mean(bits)
        spread = f" ({', '.join(f'{value:.3f}' for value in bits)})" if len(bits) > 1 else ""
        is_attempt = found["settings"].get("model.variant") == "spikegpt-driven"
        closed = f"{(plain - mean) / (plain - rwkv):.0%}" if is_attempt else "-"
        shown = next(iter(found["seeds"].values()))
        lines.append(
            f"| {name} | {len(bits)} | {mean:.3f}{spread} | {closed}"
            f" | {f'{statistics.mean(rate):.3f}' if rate else '-'}"
            f" | {shown['silent_neuron_layers']} of {shown['neuron_layers']}"
            f" | {statistics.mean(means(found, 'microjoules')):.3f}"
            f" | {statistics.mean(means(found, 'projection_ratio')):.2f}x"
            f" | {statistics.mean(means(found, 'whole_ratio')):.2f}x |"
        )
    return "\n".join(lines)


def draw(attempts: dict[str, Any], path: Path) -> None:
    """Bits a byte against energy a token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    above = math.inf  # where the name of the attempt before is: the next one goes below it
    for name, found in sorted(
        attempts.items(), key=lambda item: -statistics.mean(means(item[1], "bits_per_byte"))
    ):
        energy = statistics.mean(means(found, "microjoules"))
        bits = means(found, "bits_per_byte")
        above = min(statistics.mean(bits), above - NAME_HEIGHT)
        attempt = found["settings"].get("model.variant") == "spikegpt-driven"
        colour = "#4878a8" if attempt else "#c44e52"
        panel.plot([energy] * len(bits), bits, "o-", color=colour, markersize=5)
        panel.annotate(
            name,
            (energy, statistics.mean(bits)),
            xytext=(1.06 * energy, above),
            fontsize=8,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "grey"},
        )
    energies = [statistics.mean(means(found, "microjoules")) for found in attempts.values()]
    ticks = [value for value in (0.2, 0.3, 0.5, 1, 2, 3, 5, 10) if value < 2 * max(energies)]
    panel.set(
        xscale="log",
        xlim=(0.8 * min(energies), 1.8 * max(energies)),  # room for the names
        xlabel="microjoules a token (45 nm, float32, arithmetic only, head included)",
        ylabel="test bits a byte",
        title="what spikes in front of every projection cost, and what they save",
    )
    panel.set_xticks(ticks, [f"{value:g}" for value in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    with written_aside(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def run_name(name: str, seed: int) -> str:
    """The name of an attempt's run."""
    return f"{name.replace(', ', '_').replace(' ', '-')}-s{seed}"


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Hold the lock of a file while the block lasts."""
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
