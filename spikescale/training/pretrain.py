"""From the command line of launch/pretrain.py to a run: join, check the input together, start."""

import contextlib
import logging
import os
import sys

import torch
from safetensors import SafetensorError

from spikescale.config import RunConfig, load_config
from spikescale.data_pipeline.manifest import Manifest
from spikescale.errors import UserError
from spikescale.faults.exits import DONE, INTERRUPTED, LOST, REQUEUE, RequeueError, is_lost_rank
from spikescale.faults.guard import Guard
from spikescale.parallel import Layout
from spikescale.training.agreement import (
    AgreedError,
    agreed,
    from_main,
    only_run_in,
    say_agreed,
    say_error,
    say_lost,
)
from spikescale.training.allocator import keep_freed_memory
from spikescale.training.arguments import parse_arguments
from spikescale.training.bootstrap import (
    Process,
    join_processes,
    leave_processes,
    prepare_process,
    set_threads,
)
from spikescale.training.checkpoint import is_write_failure, write_failure
from spikescale.training.dataset import Dataset, open_prepared
from spikescale.training.engine import has_bfloat16, micro_batching, uses_fused_loss
from spikescale.training.offload import require_offload
from spikescale.training.production import Production, producer_jobs
from spikescale.training.run import Inputs, Pretraining

ROUND_SECONDS = 20.0


def pretrain(config: RunConfig, process: Process, guard: Guard | None = None) -> None:
    """Run the pretraining that `config` describes in this process, one of possibly many that have joined.

    guard: watches over this process; None: one that leaves signals alone. Raises AgreedError for input that
    cannot be trained on, UserError for a disk that cannot take what is written, and RequeueError on all ranks
    when one of them was asked to stop.
    """
    set_threads(process, config.train.threads)
    if process.device.type == "cpu":
        keep_freed_memory(large_blocks=config.zero.stage < 3)
    layout = agreed(process, lambda: Layout.of(config.parallel, process.rank, process.world_size))
    agreed(process, lambda: micro_batching(config, layout.data))
    agreed(process, lambda: uses_fused_loss(config, process.device))
    agreed(process, lambda: require_offload(config, process))
    # One process a machine checks every byte; the others would only read the same files again.
    verify = config.data.verify if process.local_rank == 0 else "size"
    with contextlib.ExitStack() as held:
        prepared = agreed(process, lambda: open_prepared(config.data, verify))
        production = _start_production(config, process, prepared, held)
        made = from_main(process, production.made)
        data = agreed(
            process, lambda: Dataset.open(config.data, prepared, production.producers, made, verify)
        )
        _pretrain_on(data, config, process, layout, guard)


def _start_production(
    config: RunConfig, process: Process, prepared: dict[str, Manifest], held: contextlib.ExitStack
) -> Production:
    """Where data are made while they are read: on rank 0, whoever makes them, ready for the first step."""

    def start() -> Production:
        production = Production(producer_jobs(config, prepared) if process.is_main else {})
        for part in config.data.parts:
            if part.label in production.producers:
                print(f"data {part.path}: starting to make it ...", flush=True)
        return held.enter_context(production)

    production = agreed(process, start)
    # In rounds: a first pass over a large corpus takes longer than a collective may.
    while config.data.mode == "streaming" and not from_main(
        process, lambda: production.wait_for_heads(ROUND_SECONDS)
    ):
        pass
    return production


def _pretrain_on(
    data: Dataset, config: RunConfig, process: Process, layout: Layout, guard: Guard | None
) -> None:
    settled = agreed(process, lambda: _with_precision(_with_vocabulary(config, data), process))
    agreed(process, lambda: _require_clear_start(settled))
    if process.world_size == 1:
        join_processes(process)
    try:
        with contextlib.ExitStack() as held:
            agreed(process, lambda: held.enter_context(only_run_in(settled.folder, process)))
            inputs = agreed(process, lambda: Inputs.open(settled, layout, data))
            # What may still be refused here (another layout, another model) every rank refuses alike.
            agreed(process, lambda: Pretraining(settled, process, layout, inputs, guard)).run()
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_write_failure(error):
            raise write_failure(error, config.folder) from error
        raise


def _with_vocabulary(config: RunConfig, data: Dataset) -> RunConfig:
    ids, wanted = data.tokenizer.vocab_size, config.model.vocab_size
    if wanted is not None and wanted < ids:
        raise UserError(
            f"model.vocab_size = {wanted}: smaller than the {ids} ids of the {data.tokenizer.kind}"
            f" tokenizer in {data.folders}; leave it out or set at least {ids}"
        )
    model = config.model.model_copy(update={"vocab_size": wanted or ids})
    return config.model_copy(update={"model": model})


def _with_precision(config: RunConfig, process: Process) -> RunConfig:
    if config.train.precision != "auto":
        return config
    chosen = "bfloat16" if has_bfloat16(process.device) else "float32"
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": chosen})})


def _require_clear_start(config: RunConfig) -> None:
    checkpoints = config.folder / "checkpoints"
    there = sorted(path.name for path in checkpoints.glob("step-*")) if checkpoints.is_dir() else []
    if config.resume == "never" and there:
        raise UserError(f"resume = never: {checkpoints} already holds {there[-1]}; choose another name")
    if config.resume == "must" and not there:
        raise UserError(f"resume = must: no checkpoint to resume in {checkpoints}")


def main(argv: list[str]) -> int:
    """The command line of launch/pretrain.py: a YAML file and settings over it; the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    arguments = parse_arguments(argv)
    process = Process(0, 1, 0, 1, torch.device("cpu"))
    guard = Guard()
    try:
        deepspeed = arguments.local_rank is not None
        process = prepare_process()
        name = f"rank {process.rank}: " if process.world_size > 1 else ""
        guard.install(os.environ, deepspeed, name)
        if process.world_size > 1:
            join_processes(process)  # first, so that whatever is wrong is said once for all ranks
        config = agreed(process, lambda: load_config(arguments.config, arguments.settings))
        pretrain(config, process, guard)
        leave_processes()
    except UserError as error:
        say_error(process, error)
        if process.world_size > 1 and not isinstance(error, AgreedError):
            os._exit(error.exit_code)  # the others are waiting for this rank: an orderly end would wait too
        leave_processes()
        return error.exit_code
    except RequeueError as request:
        say_agreed(process, str(request))
        leave_processes()
        return REQUEUE
    except KeyboardInterrupt:
        print("interrupted; the run resumes from its last checkpoint", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if process.world_size > 1 and is_lost_rank(error):
            say_lost(process, error)
            os._exit(LOST)  # an orderly end would wait for the rank that is gone
        raise
    finally:
        guard.close()
    return DONE
