"""Two engines, one of which meets a batch that is dropped; whether it can be told afterwards.

    torchrun --standalone --nproc-per-node 2 dropped_updates.py results.json

For each ZeRO stage one engine trains on batches 0 1 2 3, the other on 0 1 X 2 3, where the update of X is
dropped: because we ask for it, or because one rank's gradient is not finite.
"""

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import torch

from spikescale.config import RunConfig
from spikescale.faults.discard import discarded, was_dropped
from spikescale.model import SpikeGPT
from spikescale.parallel import Layout
from spikescale.training.bootstrap import Process, join_processes, leave_processes, prepare_process
from spikescale.training.ending import end_process
from spikescale.training.engine import build_engine, local_gradient_norm

SECONDS = 150  # after which a worker that hangs ends itself
MICRO, ACCUMULATION, CONTEXT, VOCABULARY = 2, 2, 12, 64
SETTINGS: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    {"stage": 2, "offload_optimizer": "cpu"},
    {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
]


def make_engine(zero: dict[str, Any], process: Process, precision: str) -> Any:
    config = RunConfig.model_validate(
        {
            "data": {"path": Path("nowhere")},
            "model": {"layers": 1, "width": 16, "context_length": CONTEXT, "vocab_size": VOCABULARY},
            "train": {
                "batch_size": MICRO * ACCUMULATION * process.world_size,
                "micro_batch_size": MICRO,
                "precision": precision,
            },
            "zero": zero,
        }
    )
    model = SpikeGPT(config.model, seed=1)
    return build_engine(model, config, process, Layout(process.rank, process.world_size))


def train(engine: Any, batch: int, rank: int, drop: str = "") -> tuple[float, bool]:
    """One step on a batch that differs by rank; its loss, and whether its update was dropped."""
    generator = torch.Generator().manual_seed(1000 * batch + rank)
    total, dropped = 0.0, False
    for index in range(ACCUMULATION):
        tokens = torch.randint(VOCABULARY, (MICRO, CONTEXT + 1), generator=generator)
        logits, _ = engine(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        total += float(loss.detach())
        engine.backward(loss * float("nan") if drop == "nan" and rank == 1 and index == 0 else loss)
        if index < ACCUMULATION - 1:
            engine.step()
    stage = engine.zero_optimization_stage()
    unusable = stage == 0 and not torch.isfinite(torch.tensor(local_gradient_norm(engine.module)))
    if drop == "asked" or unusable:
        dropped = True
        with discarded(engine):
            engine.step()
    else:
        engine.step()
        dropped = was_dropped(engine)
    return total, dropped


def adam_steps(engine: Any) -> list[float]:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return sorted({float(state["step"]) for state in inner.state.values() if "step" in state})


def main(path: Path) -> None:
    faulthandler.enable()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    process = prepare_process()
    torch.set_num_threads(1)
    join_processes(process)
    results = {}
    for zero in SETTINGS:
        for drop in ("asked", "nan"):
            for precision in ("float32",) if zero["stage"] in (0, 3) else ("float32", "bfloat16"):
                plain, other = (make_engine(zero, process, precision) for _ in range(2))
                expected = [train(plain, batch, process.rank)[0] for batch in range(4)]
                found = [train(other, batch, process.rank)[0] for batch in range(2)]
                _, dropped = train(other, 99, process.rank, drop)
                found += [train(other, batch, process.rank)[0] for batch in range(2, 4)]
                key = f"stage {zero['stage']} offload {zero.get('offload_optimizer')} {precision} {drop}"
                results[key] = [dropped, expected == found, adam_steps(plain) == adam_steps(other) == [4.0]]
    if process.rank == 1:
        path.write_text(json.dumps(results), encoding="utf-8")
    leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
