"""`spikescale plan`: what a run will need, before it is started."""

import argparse
from pathlib import Path
from typing import Any

from spikescale.errors import UserError

DESCRIPTION = """What a run will need before it is started: bytes a rank, tokens a second, days, money.

  spikescale plan --model 1b2 --gpus 16 --device a100-80 --tokens 300e9 --price 2
  spikescale plan --config configs/run/216m-fineweb.yaml --gpus 8 --device rtx4090
  spikescale plan --model 216m --gpus 2 --device cpu --micro-batch 1 --batch 2 --precision float32

Memory follows what the model and DeepSpeed allocate; speed is a roofline of the device's data sheet."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    what = parser.add_argument_group("the run")
    which = what.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="PRESET", help="model preset: tiny, 46m, 216m, 430m or 1b2")
    which.add_argument(
        "--config", type=Path, metavar="FILE", help="a run file, whose settings hold where no option is given"
    )
    what.add_argument(
        "--vocab", type=_whole, metavar="V", help="symbols (default: the preset's usual number)"
    )
    what.add_argument("--context", type=_whole, metavar="T", help="tokens a sequence (default: the preset's)")
    what.add_argument(
        "--batch",
        type=_whole,
        metavar="N",
        help="sequences a step, all ranks (default: one micro-batch each)",
    )
    what.add_argument(
        "--micro-batch", type=_whole, metavar="N", help="sequences a rank and forward pass (default: 8)"
    )
    what.add_argument("--precision", choices=("bfloat16", "bf16", "float32"), help="of matrix products")
    what.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, help="recompute blocks in backward"
    )
    what.add_argument("--tokens", type=_positive, metavar="N", help="tokens to train on, for days and cost")
    ranks = parser.add_argument_group("ranks")
    ranks.add_argument("--gpus", type=_whole, default=1, metavar="N", help="ranks, one a device")
    ranks.add_argument("--stage", choices=("auto", "0", "1", "2", "3"), default="auto", help="ZeRO stage")
    ranks.add_argument("--tensor", type=_whole, metavar="N", help="ranks that share one model's channels")
    ranks.add_argument("--context-ranks", type=_whole, metavar="N", help="ranks that share one sequence")
    device = parser.add_argument_group("device")
    device.add_argument(
        "--device", default="a100-80", metavar="NAME", help="h100, a100-80, a100-40, mi300x, rtx4090 or cpu"
    )
    device.add_argument("--gpu-mem", type=_positive, metavar="GIB", help="memory of one device")
    device.add_argument("--host-mem", type=_positive, metavar="GIB", help="host memory a rank, for offload")
    device.add_argument("--peak-tflops", type=_positive, metavar="X", help="of matrix products, one device")
    device.add_argument("--efficiency", type=_share, metavar="X", help="share of that peak that is reached")
    device.add_argument("--bandwidth", type=_positive, metavar="GB/S", help="of the device's memory")
    device.add_argument("--link", type=_positive, metavar="GB/S", help="from one device to the others")
    device.add_argument("--price", type=_positive, metavar="X", help="of one device and hour")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 1 when nothing fits, else 0."""
    from spikescale.planning.choice import candidates, recommend
    from spikescale.planning.report import as_json, show
    from spikescale.planning.request import read_request

    request = read_request(vars(arguments))
    stages = tuple(range(4)) if arguments.stage == "auto" else (int(arguments.stage),)
    found = candidates(request.workload, request.device, request.memory, request.host_memory, stages)
    chosen = recommend(found)
    show(request, found, chosen)
    if arguments.json:
        from spikescale.files import write_json

        try:
            write_json(arguments.json, as_json(request, found, chosen))
        except OSError as error:
            raise UserError(f"--json {arguments.json}: cannot be written ({error.strerror})") from None
    return 0 if chosen else 1


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return float("nan")


def _positive(word: str) -> Any:
    number = _number(word)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{word!r} is not a number above 0, such as 80 or 300e9")
    return number


def _share(word: str) -> Any:
    number = _number(word)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a share above 0 and up to 1")
    return number


def _whole(word: str) -> Any:
    if not (word.isascii() and word.isdigit() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number from 1 on")
    return int(word)
