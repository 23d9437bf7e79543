"""The first lines of a run on the console: what is trained on what, by how many, and how fast it could be."""

from typing import TYPE_CHECKING

import torch

from spikescale.kernels.backend import build_operators, choose_backend
from spikescale.training.engine import micro_batching
from spikescale.training.flops import measured_peak
from spikescale.training.offload import describe_offload

if TYPE_CHECKING:
    from spikescale.training.run import Pretraining

SLOW = " (the plain definition, slow; no compiled kernel serves this device)"


def introduce(run: "Pretraining") -> float:
    """Say what is about to happen, build the kernels; the measured peak of a rank in FLOP/s."""
    config, model, layout, say = run.config, run.config.model, run.layout, run.console.say
    dtype = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
    peak = measured_peak(run.process.device, dtype)
    totals = run.data.totals("train")
    micro, accumulation = micro_batching(config, layout.data)
    say(
        f"{config.name}: {model.variant}, {model.layers} layers, width {model.width},"
        f" {run.model.count_parameters(embeddings=True) / 1e6:.2f}M parameters"
        f" ({run.model.count_parameters(embeddings=False) / 1e6:.2f}M without embeddings)"
    )
    if layout.tensor > 1:
        say(f"the model is divided over {layout.tensor} ranks (parallel.tensor)")
    if layout.context > 1:
        part = model.context_length // layout.context
        say(f"sequences are divided over {layout.context} ranks, {part} tokens each")
    planned = config.train.steps * run.tokens_per_step
    if run.data.live:
        counts = [(part.name, f"{part.manifest.partitions} shards") for part in run.data.live]
        growing = ", ".join(f"{name} {count}" for name, count in counts) if run.data.mixed else counts[0][1]
        say(
            f"data {run.data.folders}: {planned} tokens of it planned, {growing} that are made while they"
            " are read"
        )
    else:
        say(
            f"data {run.data.folders}: {totals.tokens} tokens, {totals.documents} documents to train on,"
            f" {planned / totals.tokens:.2f} epochs planned"
        )
    if run.data.mixed:
        shares = (f"{part.name} {share:.2%}" for part, share in run.data.shares("train"))
        say(f"mixture by tokens: {', '.join(shares)}")
        if run.fused_loss:
            say("losses by source are not recorded: train.fused_loss keeps no logits (off records them)")
    for stage in config.data.curriculum:
        say(f"up to step {stage.until_step}: rows of {stage.context_length} tokens")
    sharding = f"ZeRO {config.zero.stage}{describe_offload(config, run.process.device)}"
    say(
        f"{run.process.world_size} rank(s) on {run.process.device.type}, {torch.get_num_threads()}"
        f" threads each, {sharding}, {config.train.precision}, {micro} x {accumulation}"
        f" sequences a rank and step, peak {peak / 1e12:.3f} TFLOP/s a rank (measured)"
    )
    if run.process.device.type == "cpu":
        build_operators(model.backend)
    kernels = choose_backend("wkv", model.backend, run.process.device.type, dtype)
    loss = ", loss fused with the head" if run.fused_loss else ""
    say(f"kernels: {kernels}{SLOW if kernels == 'reference' else ''}{loss}")
    if config.faults.inject:
        say(f"faults are injected: {config.faults.inject}")
    if not run.data.totals("valid").tokens:
        say("no validation split: nothing is validated, and no checkpoint is the best")
    if run.step:
        say(f"resumed at step {run.step}")
    if run.restore_note:
        say(run.restore_note)
    if run.step >= config.train.steps:
        say(f"train.steps = {config.train.steps} are done already; only the report is left")
    return peak
