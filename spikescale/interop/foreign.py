"""Reading weights that other programs wrote: .pth and .bin pickles, safetensors, single or sharded.

Pickles are read by `torch.load(weights_only=True)`, which makes tensors and plain containers and calls
nothing else, and memory-mapped where the file allows.
"""

import contextlib
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikescale import files
from spikescale.errors import UserError
from spikescale.tensor_shards import StoredTensors, index_name, open_stored, shard_files

# What wrappers put in front of every name: DataParallel and DeepSpeed, torch.compile, Lightning.
WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")
# Under these keys trainers keep the weights beside other things.
NESTS = ("state_dict", "model_state_dict", "module", "model")
FOLDER_FILES = (
    index_name("model.safetensors"),
    "model.safetensors",
    index_name("pytorch_model.bin"),
    "pytorch_model.bin",
)


@dataclass
class ForeignTensors:
    """Tensors by name, wrappers' prefixes taken off; read when asked for.

    Attributes:
        label: the file that errors name.
        shapes: of every tensor.
        others: keys of the file that are no tensors.
        prefix: what was taken off the names.
    """

    label: Path
    shapes: dict[str, tuple[int, ...]]
    others: list[str]
    prefix: str
    _places: dict[str, tuple[Any, str]] = field(default_factory=dict)

    def get(self, name: str) -> Tensor:
        """One tensor, as it was stored."""
        source, original = self._places[name]
        tensor: Tensor = source.get(original) if isinstance(source, StoredTensors) else source[original]
        return tensor


def find_weights(path: Path) -> Path:
    """The file or index with the weights that `path` is or, as a folder, holds. Raises UserError."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    pickles = sorted([*path.glob("*.pth"), *path.glob("*.pt")])
    if len(pickles) == 1:
        return pickles[0]
    if pickles:
        raise UserError(
            f"{path}: holds {len(pickles)} .pth files; name one of them, such as {pickles[0].name}"
        )
    raise UserError(f"{path}: holds no weights (looked for {', '.join(FOLDER_FILES)} and one *.pth)")


@contextlib.contextmanager
def open_foreign(file: Path) -> Iterator[ForeignTensors]:
    """The tensors of a .pth, .pt, .bin or .safetensors file, or of all files of an index.

    Raises UserError, in one line, for what is missing, damaged, or wants to execute something.
    """
    with contextlib.ExitStack() as stack:
        places: dict[str, tuple[Any, str]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        others: list[str] = []
        if ".safetensors" in file.suffixes:
            stored = stack.enter_context(open_stored(file))
            places = {name: (stored, name) for name in stored.names()}
            shapes = {name: stored.shape(name) for name in places}
        else:
            for part in _pickles(file):
                content = _unpickle(part)
                for name, value in content.items():
                    if isinstance(value, Tensor):
                        places[str(name)] = (content, name)
                        shapes[str(name)] = tuple(value.shape)
                    else:
                        others.append(str(name))
        if not shapes:
            raise UserError(f"{file}: holds no tensors")
        prefix = _common_prefix(set(shapes))
        yield ForeignTensors(
            label=file,
            shapes={name.removeprefix(prefix): shape for name, shape in shapes.items()},
            others=others,
            prefix=prefix,
            _places={name.removeprefix(prefix): place for name, place in places.items()},
        )


def _pickles(file: Path) -> list[Path]:
    if not file.name.endswith(".index.json"):
        return [file]
    return [file.parent / name for name in sorted(set(shard_files(file).values()))]


def _unpickle(file: Path) -> dict[Any, Any]:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if file.stat().st_size < 1:
        raise UserError(f"{file}: is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickle protocols; what cannot be read is refused
            try:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                content = torch.load(file, map_location="cpu", weights_only=True)  # torch's format before 1.6
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        if "weights_only" in reason.lower() or "Unsupported" in reason:
            reason = "it holds more than tensors, and nothing else is unpickled"
        raise UserError(f"{file}: not readable as weights ({reason})") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{file}: not readable as weights ({' '.join(str(error).split())})") from None
    for key in NESTS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}, not tensors by name")
    return content


def _common_prefix(names: set[str]) -> str:
    prefix = ""
    while wrapper := next((w for w in WRAPPERS if all(name.startswith(prefix + w) for name in names)), None):
        prefix += wrapper
    return prefix


def read_json_beside(file: Path, name: str) -> dict[str, Any] | None:
    """The JSON object `name` in the folder of `file`; None if there is no such file."""
    path = file.parent / name
    if not path.is_file():
        return None
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return content
