"""Energy a token of a ladder's trained models, by operations counted while they read (spikescale/energy)."""

import sys
from collections.abc import Iterable
from pathlib import Path

from spikescale.scaling.plan_file import Plan, PlannedRun
from spikescale.scaling.points import Count


def energy_of_runs(
    plan: Plan, families: Iterable[str], count: Count, tokens: int
) -> dict[str, list[tuple[float, float, float]]]:
    """(N, picojoules a token, the twin's energy over it) of the longest finished run of each size, by family.

    The models read the first `tokens` of the validation split. The twin is the same model with all neurons
    taken out and every projection reading floats. A run whose checkpoints were removed is left out, which is
    said; raises UserError for a model that is there and cannot be read.
    """
    import torch

    from spikescale.data_pipeline.manifest import load_manifest
    from spikescale.data_pipeline.stream import split_tokens
    from spikescale.energy import PRICES, count_operations, summarise
    from spikescale.model.store import find_model_folder, load_model_folder
    from spikescale.scaling.outcomes import is_finished

    longest: dict[tuple[str, str], PlannedRun] = {}
    for run in plan.runs:
        if run.kind != "trunk" and run.family in set(families) and is_finished(plan, run):
            best = longest.get((run.family, run.shape))
            if best is None or run.tokens > best.tokens:
                longest[run.family, run.shape] = run
    manifest = load_manifest(Path(plan.base["data"]["path"]))
    text = split_tokens(manifest, "valid")
    ids = torch.from_numpy(text[0 : min(tokens, len(text))])
    found: dict[str, list[tuple[float, float, float]]] = {}
    for run in longest.values():
        if not (plan.folder(run) / "checkpoints").is_dir():
            print(f"no energy of {run.name}: its checkpoints were removed", file=sys.stderr)
            continue
        loaded = load_model_folder(find_model_folder(plan.folder(run)))
        parts = count_operations(loaded.model, ids, context_length=loaded.config.context_length)
        summary = summarise(parts, next(iter(PRICES.values())))
        size = float(run.parameters if count == "total" else run.parameters_non_embedding)
        found.setdefault(run.family, []).append((size, summary.energy, summary.whole_ratio))
    return found
