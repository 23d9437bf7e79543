"""Two ranks train one small model under several kinds of offload; `test_offload.py` runs it with torchrun.

Prints, as one JSON object from rank 0, the losses of each case and those of plain torch on whole batches.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from spikescale.config import DataConfig, ModelConfig, RunConfig, TrainConfig, ZeroConfig
from spikescale.model import SpikeGPT
from spikescale.model.loss import language_model_loss
from spikescale.parallel import Layout
from spikescale.training.bootstrap import join_processes, leave_processes, prepare_process, set_threads
from spikescale.training.ending import end_process
from spikescale.training.engine import build_engine, build_optimizer

STEPS, BATCH, LENGTH, SYMBOLS = 20, 8, 64, 64
CPU = {"offload_optimizer": "cpu"}
CASES: dict[str, dict[str, Any]] = {
    "1-cpu": {"stage": 1, **CPU},
    "2-cpu": {"stage": 2, **CPU},
    "2-cpu-accumulating": {"stage": 2, **CPU},
    "3-cpu": {"stage": 3, **CPU, "offload_parameters": "cpu"},
    "3-small-buckets": {"stage": 3, "allgather_bucket_size": 1000, "reduce_bucket_size": 2000},
}


def config_of(zero: dict[str, Any], micro: int) -> RunConfig:
    return RunConfig(
        data=DataConfig(path=Path("none")),
        model=ModelConfig(layers=2, width=64, vocab_size=SYMBOLS, context_length=LENGTH),
        train=TrainConfig(batch_size=BATCH, micro_batch_size=micro, lr=5e-3, min_lr=1e-3, threads=1),
        zero=ZeroConfig(**zero),
    )


def batches() -> list[torch.Tensor]:
    """(BATCH, LENGTH + 1) a step: sequences that count on from a random start, which can be learnt."""
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(SYMBOLS, (STEPS, BATCH, 1), generator=generator)
    return list((starts + torch.arange(LENGTH + 1)) % SYMBOLS)


def plain_losses() -> list[float]:
    """One process, one batch, torch's Adam and clipping."""
    config = config_of({"stage": 0}, BATCH)
    model = SpikeGPT(config.model)
    optimizer = build_optimizer(model, config)
    losses = []
    for tokens in batches():
        total, loss = language_model_loss(
            model(tokens[:, :-1])[0], tokens[:, 1:], config.train.logit_regulariser
        )
        total.backward()
        norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / max(float(norm) + 1e-6, 1.0))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def losses_of(zero: dict[str, Any], micro: int, process: Any) -> list[float]:
    """The mean over ranks and forward passes, step by step."""
    config = config_of(zero, micro)
    layout = Layout.of(config.parallel, process.rank, process.world_size)
    engine = build_engine(SpikeGPT(config.model), config, process, layout)
    each = BATCH // process.world_size
    losses = []
    for tokens in batches():
        sum_of_losses = torch.zeros(())
        for part in tokens[process.rank * each :][:each].split(micro):
            logits, _ = engine(part[:, :-1])
            total, loss = language_model_loss(logits, part[:, 1:], config.train.logit_regulariser)
            engine.backward(total)
            engine.step()
            sum_of_losses += loss * micro / BATCH
        torch.distributed.all_reduce(sum_of_losses)
        losses.append(float(sum_of_losses))
    engine.destroy()
    return losses


def main(nvme: str) -> None:
    process = prepare_process()
    set_threads(process, 1)
    join_processes(process)
    cases = dict(CASES)
    if nvme:
        place = {"offload_optimizer": "nvme", "offload_parameters": "cpu", "nvme_path": Path(nvme)}
        cases["3-nvme"] = {"stage": 3, **place}
    found = {"plain": plain_losses()}
    for name, zero in cases.items():
        micro = 2 if "accumulating" in name else BATCH // process.world_size
        found[name] = losses_of(zero, micro, process)
    if process.is_main:
        print(json.dumps(found), flush=True)
    leave_processes()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
    end_process(0)
