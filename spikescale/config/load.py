"""Reading the settings: preset, then file, then `key.sub=value` words, each over the one before."""

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from spikescale.config.schema import ModelConfig, RunConfig
from spikescale.errors import UserError


def preset_names(group: str) -> list[str]:
    """Names of the files of `configs/<group>`, for example the model presets."""
    folder = importlib.resources.files("spikescale.configs") / group
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_preset(group: str, name: str) -> DictConfig:
    """The content of `configs/<group>/<name>.yaml`. Raises UserError for a name that is not there."""
    names = preset_names(group)
    if name not in names:
        raise UserError(f"{group}.preset: no preset {name!r}; there are {', '.join(names)}")
    resource = importlib.resources.files("spikescale.configs") / group / f"{name}.yaml"
    return _mapping(resource.read_text(encoding="utf-8"), f"configs/{group}/{name}.yaml")


def load_model_preset(name: str, **changes: Any) -> ModelConfig:
    """The model preset `name` (tiny, 46m, 216m, 430m, 1b2) with the given settings changed."""
    merged = _merged(read_preset("model", name), OmegaConf.create({"preset": name, **changes}))
    return _validated(ModelConfig, merged, f"model preset {name}")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings in a YAML file, changed by words such as `train.lr=1e-3`.

    `model.preset` and `zero.preset` name files of `configs/model` and `configs/zero`, whose values
    apply wherever the file and the words say nothing. Raises UserError, in one line, for a missing
    or malformed file, an unknown key, or a value of the wrong type or range.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return _settled(_merged(_mapping(text, str(path)), _overrides(overrides)), str(path))


def settings_of(content: Mapping[str, Any], overrides: Sequence[str], origin: str) -> RunConfig:
    """As `load_config`, of settings that are in memory; `origin` is what messages call them."""
    return _settled(_merged(OmegaConf.create(dict(content)), _overrides(overrides)), origin)


def _settled(merged: DictConfig, origin: str) -> RunConfig:
    for group in ("model", "zero"):
        section = merged.get(group)
        preset = section.get("preset") if isinstance(section, DictConfig) else None
        if preset is not None:
            merged[group] = _merged(read_preset(group, str(preset)), section)
    config: RunConfig = _validated(RunConfig, merged, origin)
    return config


def _merged(below: DictConfig, above: DictConfig) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(below, above))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(f"settings do not fit together ({' '.join(str(error).split())})") from None


def _mapping(text: str, origin: str) -> DictConfig:
    try:
        content = OmegaConf.create(text)
    except Exception as error:  # yaml raises a family of its own
        raise UserError(f"{origin}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{origin}: must be a mapping of settings, not a list or a single value")
    return content


def _overrides(words: Sequence[str]) -> DictConfig:
    for word in words:
        key, separator, _ = word.partition("=")
        if not separator or not key or word.startswith("-"):
            raise UserError(f"{word!r}: a setting is written key.sub=value, for example train.lr=1e-3")
    try:
        return OmegaConf.from_dotlist(list(words))
    except Exception as error:
        raise UserError(f"{' '.join(words)}: not valid settings ({' '.join(str(error).split())})") from None


def _validated(kind: type[Any], content: Any, origin: str) -> Any:
    try:
        plain = OmegaConf.to_container(content, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {' '.join(str(error).split())}") from None
    try:
        return kind.model_validate_json(_to_json(plain))
    except ValidationError as error:
        raise UserError(f"{origin}: {_first_complaint(error, kind)}") from None


def _to_json(plain: Any) -> str:
    # Through JSON, so that a strict model accepts a list for a tuple and a string for a path, which
    # YAML cannot write otherwise, and still refuses "3" for 3.
    return json.dumps(plain)


def _first_complaint(error: ValidationError, kind: type[BaseModel]) -> str:
    complaints = error.errors()
    first = complaints[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        allowed = ", ".join(_allowed_keys(kind, first["loc"][:-1]))
        message = f"unknown key {key}; allowed here: {allowed}"
    elif first["type"] == "missing":
        message = f"{key} is missing"
    elif first["type"] == "value_error":
        said = str(first["ctx"]["error"])
        message = f"{key}: {said}" if key and not said.startswith(key) else said
    else:
        message = f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    more = len(complaints) - 1
    return message + (f" (and {more} more like it)" if more else "")


def _allowed_keys(kind: type[BaseModel], location: Sequence[Any]) -> list[str]:
    found: type[BaseModel] | None = kind
    for part in location:
        if isinstance(part, str) and found is not None:  # numbers are places in a list
            found = group_in(found.model_fields[part].annotation)
    return [] if found is None else list(found.model_fields)


def group_in(annotation: Any) -> type[BaseModel] | None:
    """The group of settings in an annotation: itself, one that may be None, or that of a list's items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(group_in, get_args(annotation))), None)
