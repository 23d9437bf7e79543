"""The command line of launch/pretrain.py."""

import argparse
from collections.abc import Callable
from typing import get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from spikescale.config import RunConfig
from spikescale.config.load import group_in

DESCRIPTION = """Pretrain a spiking language model.

Start it with any of:
  deepspeed launch/pretrain.py --config configs/run/tiny.yaml train.lr=1e-3
  torchrun --nproc-per-node 8 launch/pretrain.py --config configs/run/tiny.yaml
  srun python launch/pretrain.py --config configs/run/tiny.yaml
  python launch/pretrain.py --config configs/run/tiny.yaml
  python launch/pretrain.py --ranks 2 --max-restarts 10 --config configs/run/tiny.yaml
The last one starts the ranks of this machine itself, and all of them again when one fails."""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options of a command line. Exits, with a usage line and code 2, for bad ones."""
    parser = argparse.ArgumentParser(
        prog="launch/pretrain.py",
        description=DESCRIPTION,
        epilog="Settings, with their defaults (lengths in tokens, batch sizes in sequences):\n"
        + setting_list(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file that describes the run")
    parser.add_argument(
        "--ranks", type=_at_least(1), metavar="R", help="start R ranks on this machine and look after them"
    )
    parser.add_argument(
        "--max-restarts",
        type=_at_least(0),
        metavar="N",
        help="start the ranks again, from the last checkpoint, at most N times when one fails (default: 0)",
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; not for people")
    parser.add_argument(
        "settings", nargs="*", metavar="key.sub=value", help="settings over those of the file"
    )
    # Settings may stand on either side of the options.
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    # A word such as --lr is refused as no setting, with what a setting looks like.
    arguments.settings = unknown + arguments.settings
    return arguments


def _at_least(least: int) -> Callable[[str], int]:
    def number(word: str) -> int:
        if not word.isascii() or not word.isdigit() or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word!r} is not a whole number from {least} on")
        return int(word)

    return number


def setting_list(
    kind: type[BaseModel] = RunConfig, prefix: str = "", told: dict[type[BaseModel], str] | None = None
) -> str:
    """Every setting with its default, one a line; `x[].` are keys of each item of the list x.

    told: groups whose keys have been listed, and where.
    """
    told = {} if told is None else told
    lines = []
    for name, field in kind.model_fields.items():
        group = group_in(field.annotation)
        if group is field.annotation and group is not None:
            lines.append(setting_list(group, f"{prefix}{name}."))
            continue
        default = "(required)" if field.default is PydanticUndefined else f"= {field.default}"
        lines.append(f"  {prefix}{name} {default}")
        if group is not None and group in told:
            lines[-1] += f", with the keys of {told[group]}"
        elif group is not None:
            told[group] = f"{prefix}{name}"
            mark = "[]" if get_origin(field.annotation) is tuple else ""
            lines.append(setting_list(group, f"{prefix}{name}{mark}.", told))
    return "\n".join(lines)
