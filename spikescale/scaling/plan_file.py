"""A plan: the runs of a ladder and what they share, as a YAML or JSON file."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from spikescale.config.schema import Count, Positive, Strict, Variant
from spikescale.errors import UserError
from spikescale.files import write_json, write_text

FORMAT = 1
Kind = Literal["run", "trunk", "branch", "sweep"]
Design = Literal["isoflop", "ratio", "branches", "lr-sweep"]
Amount = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class PlannedRun(Strict):
    """One run.

    A trunk trains at a constant rate and gives no point of its own; a branch continues it from the checkpoint
    at `branch_step`, lets the rate decay, and so is the whole run of `tokens` at the cost of its end.
    flop: of `tokens` tokens; cost_flop: of those that are trained here. seconds: of one device, estimated.
    """

    name: Name
    kind: Kind
    family: Variant
    layers: Positive
    width: Positive
    parameters: Positive
    parameters_non_embedding: Positive
    flop_per_token: Positive
    tokens: Positive
    steps: Positive
    lr: Amount
    flop: Amount
    cost_flop: Amount
    seconds: Amount
    budget: Amount | None = None
    branch_from: Name | None = None
    branch_step: Count | None = None
    save_at: tuple[Positive, ...] = ()
    ranks: Positive = 1

    @property
    def shape(self) -> str:
        """Layers and width, for people."""
        return f"{self.layers}x{self.width}"


class Plan(Strict):
    """A ladder of runs. base: what a run file of any of them holds, besides what the run itself says."""

    format: Literal[1] = 1
    name: Name
    design: Design
    device: str
    train_tokens: Positive  # of the data, for one pass
    vocab_size: Positive
    min_lr_share: Annotated[float, Field(ge=0, le=1)]
    decay_fraction: Annotated[float, Field(gt=0, le=1)]
    base: dict[str, Any]
    runs: tuple[PlannedRun, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Plan":
        names = [run.name for run in self.runs]
        if len(set(names)) < len(names):
            raise ValueError("runs: names must differ")
        trunks = {run.name: run for run in self.runs if run.kind == "trunk"}
        for run in self.runs:
            if (run.kind == "branch") != (run.branch_from is not None and run.branch_step is not None):
                raise ValueError(f"runs: {run.name}: branch_from and branch_step go with kind branch")
            if run.branch_from is not None:
                trunk = trunks.get(run.branch_from)
                if trunk is None or run.branch_step not in trunk.save_at:
                    raise ValueError(
                        f"runs: {run.name}: branch_from {run.branch_from} at {run.branch_step} is no"
                        " checkpoint of a trunk"
                    )
        return self

    @property
    def output(self) -> Path:
        """The folder with all that the runs write."""
        return Path(self.base["output"])

    def folder(self, run: PlannedRun) -> Path:
        """The folder of one run."""
        return self.output / run.name

    def settings(self, run: PlannedRun) -> list[str]:
        """What the run file `base` lacks of this run, as words for launch/pretrain.py."""
        words = [
            f"name={run.name}",
            f"model.variant={run.family}",
            f"model.layers={run.layers}",
            f"model.width={run.width}",
            f"train.steps={run.steps}",
            f"train.lr={run.lr:.6g}",
            f"train.min_lr={run.lr * self.min_lr_share:.6g}",
            f"train.save_at=[{','.join(map(str, run.save_at))}]",
            "train.schedule=" + ("constant" if run.kind == "trunk" else "wsd"),
            f"train.decay_fraction={self.decay_fraction:.6g}",
        ]
        if run.family == "rwkv":
            words.append("model.binary_embedding=false")
        if run.branch_from is not None:
            step = f"step-{run.branch_step:08d}"
            words.append(f"branch_from={self.output / run.branch_from / 'checkpoints' / step}")
        return words


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises UserError, in one line, for anything that is not one."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML too
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a plan of format {FORMAT}; `spikescale scaling plan` writes them")
    try:
        return Plan.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {key + ': ' if key else ''}{first['msg']}") from None


def write_plan(plan: Plan, path: Path) -> None:
    """Write the plan as JSON (`.json`) or YAML. Raises UserError for a place that cannot be written."""
    content = plan.model_dump(mode="json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            write_json(path, content)
        else:
            write_text(path, yaml.safe_dump(content, sort_keys=False, width=110))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
