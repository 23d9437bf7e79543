"""Lists of articles: the ready ones of this package, and the user's own YAML files."""

import importlib.resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spikescale.errors import UserError


class Group(BaseModel):
    """Which articles to collect.

    Attributes:
        summary: what they are.
        count: how many articles are wanted.
        titles, categories, top: where candidates come from, exactly one of the three: a list of titles;
            Wikipedia categories (without `Category:`) and their sub-categories down to `depth`; months
            (YYYY-MM) whose most viewed pages they are.
        candidates: of categories, the most pages that are looked at.
        rank_by: `views` (the most viewed first) or `order` (as listed).
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    summary: str = ""
    count: int = Field(default=100, ge=1)
    titles: list[str] = []
    categories: list[str] = []
    top: list[str] = []
    depth: int = Field(default=0, ge=0, le=5)
    candidates: int = Field(default=2000, ge=1)
    rank_by: Literal["views", "order"] = "order"

    @model_validator(mode="after")
    def _one_origin(self) -> "Group":
        given = [name for name in ("titles", "categories", "top") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError("give exactly one of titles, categories, top")
        return self


def ready_groups() -> dict[str, Group]:
    """The groups of this package, by name."""
    folder = importlib.resources.files(__package__) / "groups"
    files = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda e: e.name
    )
    return {
        file.name.removesuffix(".yaml"): _validated(
            file.name, file.name, yaml.safe_load(file.read_text(encoding="utf-8"))
        )
        for file in files
    }


def read_groups(path: Path) -> dict[str, Group]:
    """The groups of a YAML file that maps names to what `Group` says. Raises UserError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must map names of groups to their settings")
    return {str(name): _validated(str(path), str(name), group) for name, group in content.items()}


def _validated(origin: str, name: str, content: object) -> Group:
    try:
        return Group.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([name, *map(str, first["loc"])])
        reason = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
        if first["type"] == "extra_forbidden":
            reason = f"unknown key; allowed: {', '.join(Group.model_fields)}"
        raise UserError(f"{origin}: {key}: {reason}") from None
