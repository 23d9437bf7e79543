"""A tuning that was stopped goes on from here: one safetensors file, its figures in the header."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spikescale.errors import UserError
from spikescale.files import written_aside
from spikescale.tensor_file import write_tensors

FILE = "progress.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, by torch's names


@dataclass
class Figures:
    """What is known so far, besides tensors. Losses are nats a token on the validation text.

    Attributes:
        step: optimizer steps made. best_step, best_loss: where the validation loss was lowest.
        before, kept_before: results on the test texts before the first step, as JSON.
        seconds, cpu_seconds: of the steps.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    before: dict[str, Any] | None = None
    kept_before: dict[str, Any] | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def save_progress(
    folder: Path,
    identity: Mapping[str, Any],
    figures: Figures,
    parameters: Mapping[str, torch.nn.Parameter],
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write everything that the next step depends on; whole, or the file of before is left."""
    tensors: dict[str, Tensor] = {"random": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, p in parameters.items():
        tensors[f"now/{name}"], tensors[f"best/{name}"] = p, best[name]
        for moment in MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[p][moment]
    described = {"identity": json.dumps(dict(identity)), "figures": json.dumps(vars(figures))}
    with written_aside(folder / FILE) as temporary:
        write_tensors(temporary, tensors, described)


def load_progress(
    folder: Path,
    identity: Mapping[str, Any],
    parameters: Mapping[str, torch.nn.Parameter],
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> Figures | None:
    """Bring parameters, best weights and the optimizer to where they were; None where nothing was saved.

    Raises UserError for a file that is damaged or of other settings.
    """
    file = folder / FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            described = stored.metadata()
            earlier = json.loads(described["identity"])
            wanted = json.loads(json.dumps(dict(identity)))
            changed = [key for key in sorted({*wanted, *earlier}) if wanted.get(key) != earlier.get(key)]
            if changed:
                key = changed[0]
                raise UserError(
                    f"{file}: a tuning with {key} = {earlier.get(key)} was stopped here, and this one has "
                    f"{wanted.get(key)}; choose another --output, or remove the folder"
                )
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(stored.get_tensor(f"now/{name}"))
                    best[name].copy_(stored.get_tensor(f"best/{name}"))
                    moments = {key: stored.get_tensor(f"{key}/{name}").to(p.device) for key in MOMENTS}
                    figures = Figures(**json.loads(described["figures"]))
                    optimizer.state[p] = {"step": torch.tensor(float(figures.step)), **moments}
            torch.set_rng_state(stored.get_tensor("random"))
            if torch.cuda.is_available() and "random.cuda" in stored.keys():  # noqa: SIM118 - no mapping
                torch.cuda.set_rng_state(stored.get_tensor("random.cuda"))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{file}: damaged or not such a file ({' '.join(str(error).split())[:200]})"
        ) from None
    return figures
