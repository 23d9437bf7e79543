"""`spikescale finetune`: train a pretrained model further on new text, and save an ordinary model."""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikescale.errors import UserError

if TYPE_CHECKING:
    from spikescale.finetune.methods import MethodSettings
    from spikescale.finetune.texts import TuningText
    from spikescale.finetune.tune import TuneResult
    from spikescale.model.store import LoadedModel

EXAMPLES = """examples:
  spikescale finetune runs/shakespeare --data data/sotu-byte --output runs/sotu-full
  spikescale finetune runs/shakespeare --text speeches/*.txt --method lora --rank 8 --output runs/sotu-lora
  spikescale finetune runs/shakespeare --data data/sotu-byte --method frozen --frozen-layers 2 \\
      --kept data/shakespeare-byte --output runs/sotu-frozen"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = EXAMPLES
    parser.add_argument("model", type=Path, help="run folder, checkpoint or model folder to start from")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="FOLDER", help="prepared data, by the model's tokenizer")
    what.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="text files: 90%% to train on, 5%% valid, 5%% test",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where everything goes")
    parser.add_argument(
        "--kept",
        type=Path,
        metavar="FOLDER",
        help="prepared data that the model knew, to see what it forgets (default: none)",
    )
    how = parser.add_argument_group("method")
    how.add_argument("--method", choices=("full", "frozen", "lora"), default="full", help="what is trained")
    how.add_argument(
        "--frozen-layers",
        type=int,
        metavar="N",
        help="of frozen: first blocks left as they are (default: half)",
    )
    how.add_argument("--rank", type=int, default=8, help="of lora")
    how.add_argument(
        "--alpha", type=float, default=16.0, help="of lora: the update is scaled by alpha / rank"
    )
    how.add_argument(
        "--lora-dropout", type=float, default=0.0, help="of lora: on the adapters' input, 0 to 1"
    )
    how.add_argument(
        "--targets", default="key,value,receptance,output", help="of lora: time-mix projections, with commas"
    )
    train = parser.add_argument_group("training")
    train.add_argument("--steps", type=int, default=500, help="optimizer steps")
    train.add_argument("--batch-size", type=int, default=16, help="sequences a step")
    train.add_argument("--micro-batch-size", type=int, help="sequences a forward pass (default: all at once)")
    train.add_argument(
        "--context-length", type=int, metavar="TOKENS", help="of a sequence (default: the model's)"
    )
    train.add_argument("--lr", type=float, help="highest learning rate (default: 5e-4; lora 5e-3)")
    train.add_argument("--warmup-steps", type=int, default=20, help="steps over which the rate rises")
    train.add_argument("--weight-decay", type=float, default=0.0, help="of matrices")
    train.add_argument(
        "--evaluate-every", type=int, default=50, metavar="STEPS", help="validation; 0: at the end"
    )
    train.add_argument("--evaluate-tokens", type=int, default=65536, help="of the valid text, at most")
    train.add_argument("--test-tokens", type=int, help="of the test texts, at most (default: all)")
    train.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of the products"
    )
    train.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    train.add_argument("--seed", type=int, default=0, help="of the data's order and of dropout")
    train.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--no-mlflow", action="store_true", help="do not track the run in MLflow")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")


def run(arguments: argparse.Namespace) -> int:
    """Tune, save the model and the figures, and print them."""
    from dataclasses import asdict

    import torch

    from spikescale.files import sha256_file
    from spikescale.finetune.methods import MethodSettings, Tuning
    from spikescale.finetune.texts import prepared_text, raw_text
    from spikescale.finetune.tune import Tuner, TuneSettings
    from spikescale.inference.device import choose_device
    from spikescale.model.store import SETTINGS, find_model_folder, load_model_folder

    method = MethodSettings(
        method=arguments.method,
        frozen_layers=arguments.frozen_layers,
        rank=arguments.rank,
        alpha=arguments.alpha,
        dropout=arguments.lora_dropout,
        targets=tuple(name.strip() for name in arguments.targets.split(",") if name.strip()),
    )
    train = _train_settings(arguments)
    output = arguments.output
    _require_room(output)
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    device = choose_device(arguments.device)
    loaded = load_model_folder(find_model_folder(arguments.model))
    length = arguments.context_length or loaded.config.context_length
    if arguments.data is not None:
        text = prepared_text(arguments.data, loaded.tokenizer, length, arguments.seed)
    else:
        text = raw_text(arguments.text, loaded.tokenizer, length, arguments.seed)
    kept = None if arguments.kept is None else prepared_text(arguments.kept, loaded.tokenizer, length, 0).test
    tuning = Tuning(loaded.model.to(device), method, str(arguments.model), arguments.seed)
    settings = TuneSettings(train, length, arguments.test_tokens)
    identity = {
        "base": sha256_file(loaded.folder / SETTINGS),
        "data": text.identity,
        "context_length": length,
        "test_tokens": arguments.test_tokens,
        **asdict(method),
        **train.model_dump(mode="json"),
    }
    with _Records(arguments, output, text) as records:
        tuner = Tuner(
            tuning,
            loaded.tokenizer,
            text,
            settings,
            kept=kept,
            record=records.write,
            folder=output,
            identity=identity,
            adapter=output / "adapter",
        )
        records.begin(tuner.figures.step)
        result = tuner.run()
        figures = _figures(arguments, loaded, method, text, result)
        _save(output, loaded, tuning, figures)
        records.finish(figures)
    _print(figures, output, arguments.json)
    return 0


def _require_room(output: Path) -> None:
    from spikescale.finetune.progress import FILE

    if not output.exists():
        return
    if (output / "finetune.json").exists():
        raise UserError(f"--output {output}: holds a finished tuning; choose another")
    if not output.is_dir() or (any(output.iterdir()) and not (output / FILE).exists()):
        raise UserError(f"--output {output}: already exists and is not empty")


def _train_settings(arguments: argparse.Namespace) -> Any:
    from pydantic import ValidationError

    from spikescale.config import TrainConfig

    lr = arguments.lr or (5e-3 if arguments.method == "lora" else 5e-4)
    try:
        return TrainConfig(
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            micro_batch_size=arguments.micro_batch_size,
            optimizer="adamw",
            lr=lr,
            min_lr=lr / 10,
            warmup_steps=min(arguments.warmup_steps, arguments.steps),
            weight_decay=arguments.weight_decay,
            evaluate_every=arguments.evaluate_every,
            evaluate_tokens=arguments.evaluate_tokens,
            precision=arguments.precision,
            seed=arguments.seed,
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        raise UserError(f"--{name} {first['input']}: {first['msg'].lower()}") from None


def _figures(
    arguments: argparse.Namespace,
    loaded: "LoadedModel",
    method: "MethodSettings",
    text: "TuningText",
    result: "TuneResult",
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "base": str(loaded.folder),
        "data": " ".join(map(str, arguments.text or [arguments.data])),
        "data_sha256": text.identity,
        "train_tokens": text.train_tokens,
        "method": asdict(method),
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "lr": arguments.lr or (5e-3 if arguments.method == "lora" else 5e-4),
        "seed": arguments.seed,
        **result.as_dict(),
    }


def _save(output: Path, loaded: "LoadedModel", tuning: Any, figures: dict[str, Any]) -> None:
    from spikescale.files import write_json
    from spikescale.finetune.progress import FILE as PROGRESS
    from spikescale.model.store import save_model_folder

    # Written before and not finished: everything that follows is as it was then.
    shutil.rmtree(output / "model", ignore_errors=True)
    info = {
        **{name: figures[name] for name in ("base", "data", "data_sha256", "method", "steps", "best_step")},
        "test_bits_per_byte": figures["after"]["bits_per_byte"],
        "before": loaded.info,
    }
    weights = tuning.merged_weights()
    save_model_folder(output / "model", weights, loaded.config, loaded.tokenizer, info)
    write_json(output / "finetune.json", figures)
    (output / PROGRESS).unlink(missing_ok=True)


class _Records:
    """metrics.jsonl, curves.png and the MLflow run, and a line or a bar for whoever looks on."""

    def __init__(self, arguments: argparse.Namespace, output: Path, text: "TuningText") -> None:
        self._arguments, self._output, self._text = arguments, output, text

    def __enter__(self) -> "_Records":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from spikescale.tracking.mlflow_run import MlflowRun
        from spikescale.tracking.mlflow_store import default_store

        arguments, output = self._arguments, self._output
        output.mkdir(parents=True, exist_ok=True)
        self._metrics: Any = None
        self._mlflow = None
        if not arguments.no_mlflow:
            self._mlflow = MlflowRun(
                default_store(output.parent),
                "spikescale-finetune",
                output.name,
                artifacts=output.parent / "mlartifacts",
            )
            settings = {
                name: value for name, value in vars(arguments).items() if name not in ("run", "command")
            }
            self._mlflow.log_parameters(settings)
            self._mlflow.set_tags({"data.sha256": self._text.identity})
        console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._bar.start()
        self._task = self._bar.add_task(f"tuning ({arguments.method})", total=arguments.steps)
        return self

    def begin(self, step: int) -> None:
        """Go on from this step: what was recorded after it is dropped."""
        from spikescale.tracking.metrics_file import MetricsFile

        self._metrics = MetricsFile(self._output / "metrics.jsonl", step)
        if step and not self._arguments.json:
            print(f"resumed at step {step}", file=sys.stderr, flush=True)

    def write(self, record: dict[str, Any]) -> None:
        """Take the figures of a step."""
        self._metrics.write(record)
        if self._mlflow is not None:
            numbers = {name: value for name, value in record.items() if name != "step"}
            self._mlflow.log_metrics(numbers, record["step"])
        self._bar.update(self._task, completed=record["step"])
        if "valid_loss" in record and not self._arguments.json:
            bits = f"valid bits/byte {record['valid_bits_per_byte']:.4f}"
            print(f"step {record['step']}/{self._arguments.steps}  {bits}", file=sys.stderr, flush=True)

    def finish(self, figures: dict[str, Any]) -> None:
        """Draw the curves and hand everything over."""
        from spikescale.tracking.curves import plot_curves
        from spikescale.tracking.metrics_file import read_metrics

        self._metrics.close()
        plot_curves(
            read_metrics(self._output / "metrics.jsonl"), self._output / "curves.png", self._output.name
        )
        if self._mlflow is not None:
            self._mlflow.log_metrics(
                {
                    "summary/test_bits_per_byte": figures["after"]["bits_per_byte"],
                    "summary/test_bits_per_byte_before": figures["before"]["bits_per_byte"],
                    "summary/trainable": figures["trainable"],
                },
                figures["steps"],
            )
            for name in ("finetune.json", "metrics.jsonl", "curves.png"):
                self._mlflow.log_file(self._output / name)

    def __exit__(self, kind: Any, *_: object) -> None:
        self._bar.stop()
        if self._metrics is not None:
            self._metrics.close()
        if self._mlflow is not None:
            self._mlflow.finish("FINISHED" if kind is None else "FAILED")


def _print(figures: dict[str, Any], output: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    share = figures["trainable"] / figures["total"]
    rows = [
        ("trained parameters", f"{figures['trainable']:,} of {figures['total']:,} ({share:.1%})"),
        ("weights, gradients, moments", f"{figures['state_bytes'] / 2**20:.1f} MiB"),
        ("peak memory", f"{figures['peak_bytes'] / 2**20:.0f} MiB"),
        ("training", f"{figures['seconds']:.1f} s, {figures['cpu_seconds']:.1f} s of CPU time"),
        ("best step", f"{figures['best_step']} of {figures['steps']}"),
        ("test bits/byte", _change(figures["before"], figures["after"])),
    ]
    if figures["kept_before"] is not None:
        rows.append(("kept text, bits/byte", _change(figures["kept_before"], figures["kept_after"])))
    rows.append(("model", str(output / "model")))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _change(before: dict[str, Any], after: dict[str, Any]) -> str:
    return f"{before['bits_per_byte']:.4f} before, {after['bits_per_byte']:.4f} after"
