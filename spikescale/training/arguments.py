"""The command line of launch/pretrain.py."""

import argparse

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from spikescale.config import RunConfig, load_config
from spikescale.errors import UserError

DESCRIPTION = """Pretrain a spiking language model.

Start it with any of:
  deepspeed launch/pretrain.py --config configs/run/tiny.yaml train.lr=1e-3
  torchrun --nproc-per-node 8 launch/pretrain.py --config configs/run/tiny.yaml
  srun python launch/pretrain.py --config configs/run/tiny.yaml
  python launch/pretrain.py --config configs/run/tiny.yaml"""


def parse_arguments(argv: list[str]) -> RunConfig:
    """The run that a command line describes. Raises UserError for bad settings, exits for bad options."""
    parser = argparse.ArgumentParser(
        prog="launch/pretrain.py",
        description=DESCRIPTION,
        epilog="Settings, with their defaults (lengths in tokens, batch sizes in sequences):\n"
        + setting_list(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file that describes the run")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; not for people")
    parser.add_argument(
        "settings", nargs="*", metavar="key.sub=value", help="settings over those of the file"
    )
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"{unknown[0]!r}: a setting is written key.sub=value, for example train.lr=1e-3")
    return load_config(arguments.config, arguments.settings)


def setting_list(kind: type[BaseModel] = RunConfig, prefix: str = "") -> str:
    """Every setting with its default, one a line."""
    lines = []
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines.append(setting_list(field.annotation, f"{prefix}{name}."))
        else:
            default = "(required)" if field.default is PydanticUndefined else f"= {field.default}"
            lines.append(f"  {prefix}{name} {default}")
    return "\n".join(lines)
