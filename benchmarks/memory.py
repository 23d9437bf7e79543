"""Peak memory of real training processes beside what `spikescale plan` says they will take.

    python benchmarks/memory.py
    python benchmarks/memory.py --rows 216m-stage1 46m-stage3-2ranks

Each row starts its ranks as processes of their own, which build the model, shard it with DeepSpeed as the
trainer does, and make some optimizer steps on random tokens, with the trainer's allocator settings. Measured
is the largest resident set that any rank ever had (VmHWM), from its first to its last instruction: libraries,
building and sharding are in it. "plan" is the planner's peak for the same settings. The row of 1b2 needs
18 GB of disk in TMPDIR, and libaio.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common import arguments, peak_bytes, positive, random_tokens, report, resident_bytes, write_results

from spikescale.config import load_model_preset
from spikescale.config.schema import ModelConfig, TrainConfig, ZeroConfig
from spikescale.errors import UserError
from spikescale.files import read_json
from spikescale.planning.devices import GIB, find_device
from spikescale.planning.memory import MemoryPlan, Workload, plan_memory

TIMEOUT = 1800
BYTES, NEOX = 256, 50277
PRECISIONS = ("float32", "bfloat16")
ATTENTION = 0.10  # a larger deviation is marked in the table


@dataclass(frozen=True)
class Row:
    """One case. `accumulation` is in forward passes a step."""

    model: str
    stage: int
    ranks: int = 1
    offload: Literal["none", "cpu", "nvme"] = "none"
    checkpointing: bool = False
    precision: str = "float32"
    micro_batch: int = 1
    accumulation: int = 1
    variant: str = "spikegpt"

    @property
    def steps(self) -> int:
        """Optimizer steps after which the heap of a process has stopped growing."""
        if self.offload == "nvme":
            return 3  # each reads and writes all states
        return 8 if self.stage == 3 else 3

    @property
    def name(self) -> str:
        """Unique and readable."""
        words = [self.model, f"stage{self.stage}"]
        words += [self.offload] if self.offload != "none" else []
        words += [f"{self.ranks}ranks"] if self.ranks > 1 else []
        words += ["checkpointed"] if self.checkpointing else []
        words += ["bf16"] if self.precision == "bfloat16" else []
        words += [f"batch{self.micro_batch}"] if self.micro_batch > 1 else []
        words += [f"accumulation{self.accumulation}"] if self.accumulation > 1 else []
        words += [self.variant] if self.variant != "spikegpt" else []
        return "-".join(words)

    def model_config(self, length: int) -> ModelConfig:
        """The preset with its usual vocabulary."""
        symbols = BYTES if self.model in ("tiny", "46m") else NEOX
        changes = {"vocab_size": symbols, "context_length": length, "variant": self.variant, "backend": "cpu"}
        return load_model_preset(self.model, **changes)

    def workload(self, length: int) -> Workload:
        """The row as the planner takes it."""
        device = find_device("cpu")
        train = TrainConfig(
            batch_size=self.micro_batch * self.accumulation * self.ranks,
            micro_batch_size=self.micro_batch,
            precision="bfloat16" if self.precision == "bfloat16" else "float32",
            activation_checkpointing=self.checkpointing,
            threads=1,
        )
        zero = ZeroConfig(
            stage=self.stage,
            offload_optimizer=self.offload,
            offload_parameters="cpu" if self.stage == 3 and self.offload != "none" else "none",
            nvme_path=Path(tempfile.gettempdir()) / "spikescale-nvme" if self.offload == "nvme" else None,
        )
        model = self.model_config(length)
        return Workload(model, train, zero, ranks=self.ranks, on_cpu=True, baseline=device.baseline)


def rows() -> list[Row]:
    """The cases of the table."""
    found = [Row("46m", stage, ranks) for ranks in (1, 2) for stage in range(4)]
    found += [Row("46m", stage, 1, "cpu") for stage in (1, 2, 3)]
    found += [Row("46m", 1, precision=precision, checkpointing=True) for precision in PRECISIONS]
    found += [Row("46m", 1, precision="bfloat16"), Row("46m", 1, micro_batch=4)]
    found += [Row("46m", stage, 2, accumulation=2) for stage in (1, 2)]
    found += [Row("216m", stage) for stage in range(4)]
    found += [Row("216m", stage, 2) for stage in (1, 2, 3)]
    found += [Row("216m", 1, checkpointing=True), Row("216m", 1, precision="bfloat16")]
    found += [Row("216m", 2, 2, checkpointing=True, precision="bfloat16")]
    found += [Row("216m", 3, 2, checkpointing=True), Row("216m", 2, 2, "cpu")]
    found += [Row("430m", 0, checkpointing=True)]
    found += [Row(model, 3, 1, "nvme", checkpointing=True) for model in ("46m", "216m", "1b2")]
    return found


def step_repeatedly(row: Row, length: int) -> dict[str, Any]:
    """What one rank does: the trainer's start and steps. Bytes at each stage of it."""
    import torch

    from spikescale.config import DataConfig, MlflowConfig, RunConfig
    from spikescale.kernels.backend import build_operators
    from spikescale.model import SpikeGPT
    from spikescale.model.loss import language_model_loss
    from spikescale.parallel import Layout
    from spikescale.training.allocator import keep_freed_memory
    from spikescale.training.bootstrap import join_processes, leave_processes, prepare_process, set_threads
    from spikescale.training.engine import build_engine

    process = prepare_process()
    set_threads(process, 1)
    kept = keep_freed_memory(large_blocks=row.stage < 3)
    work = row.workload(length)
    config = RunConfig(
        data=DataConfig(path=Path("none")),
        model=work.model,
        train=work.train,
        zero=work.zero,
        mlflow=MlflowConfig(enabled=False),
    )
    if work.zero.nvme_path is not None:
        work.zero.nvme_path.mkdir(exist_ok=True)
    join_processes(process)
    build_operators("auto")
    sizes = {"started": resident_bytes()}
    layout = Layout.of(config.parallel, process.rank, process.world_size)
    model = SpikeGPT(work.model)
    model.activation_checkpointing = row.checkpointing
    sizes["built"] = peak_bytes()
    engine = build_engine(model, config, process, layout)
    sizes["sharded"] = peak_bytes()
    for step in range(row.steps):
        for part in range(row.accumulation):
            seed = step * row.accumulation + part
            tokens = random_tokens(row.micro_batch, length, int(work.model.vocab_size or 0), seed)
            total, loss = _loss(engine, tokens, work.train.logit_regulariser, language_model_loss)
            sizes[f"forward {step}.{part}"] = peak_bytes()
            engine.backward(total)
            sizes[f"backward {step}.{part}"] = peak_bytes()
            engine.step()
        sizes[f"step {step}"] = peak_bytes()
    result = {"sizes": sizes, "peak": peak_bytes(), "loss": float(loss), "kept_freed_memory": kept}
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
    leave_processes()
    return result


def _loss(engine: Any, tokens: Any, regulariser: float, function: Any) -> Any:
    logits, _ = engine(tokens[:, :-1])
    return function(logits, tokens[:, 1:], regulariser)


def measure_row(row: Row, length: int) -> dict[str, Any]:
    """Run a row's ranks and collect what they say. Raises UserError when one fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = time.perf_counter()
    ranks = []
    for rank in range(row.ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(row.ranks),
            "LOCAL_WORLD_SIZE": str(row.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        command = [sys.executable, __file__, "--worker", json.dumps(row.__dict__), "--length", str(length)]
        ranks.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    results = []
    try:
        for process in ranks:
            output, errors = process.communicate(timeout=TIMEOUT)
            if process.returncode:
                last = errors.strip().splitlines()[-1:] or ["no message"]
                raise UserError(f"{row.name}: a rank ended with {process.returncode}: {last[0]}")
            results.append(json.loads(output.strip().splitlines()[-1]))
    finally:
        for process in ranks:
            process.kill()
        if (place := row.workload(length).zero.nvme_path) is not None:
            shutil.rmtree(place, ignore_errors=True)
    largest = max(results, key=lambda result: result["peak"])
    return {"seconds": time.perf_counter() - started, "ranks": results, **largest}


def planned(plan: MemoryPlan, measured: int) -> dict[str, Any]:
    """The planner's part of a row."""
    return {
        "planned_bytes": plan.device_bytes,
        "planned_phases": {p.name: p.device_bytes + p.host_bytes for p in plan.phases},
        "ratio": plan.device_bytes / measured,
    }


def summarise(row: Row, measured: dict[str, Any], length: int) -> dict[str, Any]:
    """A row of the JSON."""
    return {
        **row.__dict__,
        "length": length,
        "measured_bytes": measured["peak"],
        "measured_sizes": measured["sizes"],
        **planned(plan_memory(row.workload(length)), measured["peak"]),
        "loss": measured["loss"],
        "seconds": measured["seconds"],
    }


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    off = abs(row["ratio"] - 1) > ATTENTION
    return [
        name,
        f"{row['measured_bytes'] / GIB:.2f}",
        f"{row['planned_bytes'] / GIB:.2f}",
        f"{row['ratio'] - 1:+.1%}" + (" !" if off else ""),
    ]


def plot(summary: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars of measured and planned bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(summary)
    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(names) + 1.2), layout="constrained")
    places = range(len(names))
    for shift, key, label in ((-0.2, "measured_bytes", "measured"), (0.2, "planned_bytes", "planned")):
        axes.barh([p + shift for p in places], [summary[n][key] / GIB for n in names], 0.4, label=label)
    axes.set_yticks(list(places), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("peak of one rank, GiB")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def earlier_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file that an earlier call wrote, with what the planner says of them now."""
    found = read_json(path)["rows"] if path.exists() else {}
    fields = Row.__dataclass_fields__
    for name, row in found.items():
        case = Row(**{key: row[key] for key in fields})
        plan = plan_memory(case.workload(row["length"]))
        found[name] = row | planned(plan, row["measured_bytes"])
    return found


def results_of(summary: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file holds."""
    return {"settings": {"length": options.length, "threads": 1}, "rows": summary}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__.splitlines()[0], "memory")
    names = [row.name for row in rows()]
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=names, default=names, help="which rows")
    parser.add_argument("--length", type=positive, default=1024, metavar="T", help="tokens a sequence")
    parser.add_argument(
        "--add", action="store_true", help="keep the rows that the output file has and --rows does not name"
    )
    parser.add_argument("--plan-only", action="store_true", help="print what would be run, and run nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    """Measure, print, write, draw."""
    summary = earlier_rows(options.output) if options.add else {}
    chosen = [row for row in rows() if row.name in options.rows]
    for row in chosen:
        if options.plan_only:
            plan = plan_memory(row.workload(options.length))
            print(f"{row.name}: {plan.device_bytes / GIB:.2f} GiB a rank, {row.ranks} rank(s)")
            continue
        summary[row.name] = summarise(row, measure_row(row, options.length), options.length)
        print("  ".join(cells(row.name, summary[row.name])), flush=True)
        write_results(results_of(summary, options), options.output)
    if options.plan_only:
        return
    columns = ["", "measured GiB", "plan GiB", "difference"]
    table = [cells(name, row) for name, row in summary.items()]
    report("Peak of one rank", columns, table, results_of(summary, options), options.output)
    plot(summary, options.output.with_suffix(".png"))


if __name__ == "__main__":
    arguments_given = parse()
    try:
        if arguments_given.worker:
            print(
                json.dumps(step_repeatedly(Row(**json.loads(arguments_given.worker)), arguments_given.length))
            )
        else:
            run(arguments_given)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
